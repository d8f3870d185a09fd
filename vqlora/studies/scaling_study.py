"""What notebook 10 asks of finished runs: curves of loss against size, their laws, and what quality costs.

    curves = [*from_runs("rank", runs, rank_of), *from_frames(policies)]
    points(curves)                     # axis, domain, x, metric, value, low, high
    fits(curves)                       # axis, domain, metric, value, low, high, verdict
    costs = arms_by_cost(results)      # recipe, domain, arm: nll, bytes, FLOPs, parameters, on which fronts
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora import comparison, scaling, stats
from vqlora.store import StoredRun
from vqlora.studies import rate_study

COSTS = ("train_bytes", "step_flops", "trainable_parameters")
# Bytes of a step depend on what was computed in, too.
RECIPE = ["steps", "batch_size", "train_clips", "eval_part", "eval_clips", "frames", "compute_dtype"]
# Whose arms may share a chart.
RECIPES = {"main": "03_main", "ranks": "06_ranks", "placement": "09_rank_size_and_placement"}
# Where arms come from: of a notebook its runs, costs and summary; `03_more` are the further methods of 03.
FILES = ("runs", "cost", "summary")
COMPARED = {
    "03_main": ("03_main", FILES),
    "03_more": ("03_main", ("more_runs", "more_cost", "more")),
    "06_ranks": ("06_ranks", FILES),
    "08_bits": ("08_bits", FILES),
    "09_rank_size_and_placement": ("09_rank_size_and_placement", FILES),
}
# Of 08: QLoRA once more, and bits that are held in 16 bits to simulate them.
LEFT_OUT = {"08_bits": ("nf4", "int2", "int3")}


@dataclass(frozen=True)
class Sizes:
    """Losses at several sizes on one domain: `x [X]` ascending, `values [X, S, C]` (see `vqlora.scaling`)."""

    axis: str
    domain: str
    x: np.ndarray
    values: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.axis} ({self.domain})"


# -- curves


def from_runs(
    axis: str,
    runs: Sequence[StoredRun],
    size: Callable[[StoredRun], float],
    *,
    metric: str = "nll",
    values: Callable | None = None,
) -> list[Sizes]:
    """One curve a domain from runs with their rows per example, `size(run)` on its axis.

    Raises ValueError, naming the size, where one was not run with the seeds and clips of the others.
    """
    curves = []
    for domain in dict.fromkeys(run.settings.domain for run in runs):
        own: dict[float, list[StoredRun]] = {}
        for run in runs:
            if run.settings.domain == domain:
                own.setdefault(float(size(run)), []).append(run)
        cells = {
            x: stats.crossed(comparison.clip_values(own[x], metric, values), f"{axis} {x:g}")
            for x in sorted(own)
        }
        first = next(iter(cells.values()))
        for x, matrix in cells.items():
            if not (first.index.equals(matrix.index) and first.columns.equals(matrix.columns)):
                raise ValueError(f"{axis} {x:g} on {domain}: other seeds or clips than {axis} {min(cells):g}")
        stacked = np.stack([matrix.to_numpy() for matrix in cells.values()])
        curves.append(Sizes(axis, domain, np.array(list(cells)), stacked))
    return curves


def from_frames(policies: pd.DataFrame, policy: str = "uniform") -> list[Sizes]:
    """The curve of notebook 07's trained models against frames shown: one model a domain, so that the domains
    take the place of clips, and an interval is one over domains like these.

    policies: domain, frames, policy, nll. Domains that lack a number of frames are left out.
    """
    own = policies[policies["policy"] == policy].pivot(index="frames", columns="domain", values="nll")
    own = own.sort_index().dropna(axis=1)
    x = own.index.to_numpy(float)
    return [Sizes("frames", "targets", x, own.to_numpy()[:, None, :])] if own.shape[1] else []


def points(curves: Sequence[Sizes], seed: int = 0) -> pd.DataFrame:
    """Every size of every curve with the interval of its mean: axis, domain, x, metric, value, low, high."""
    rng, rows = np.random.default_rng(seed), []
    for curve in curves:
        for x, matrix in zip(curve.x, curve.values, strict=True):
            found = stats.interval(matrix, rng)
            rows.append((curve.axis, curve.domain, x, "nll", found.mean, found.low, found.high))
    return pd.DataFrame(rows, columns=["axis", "domain", "x", "metric", "value", "low", "high"])


def fits(curves: Sequence[Sizes], resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The law of every curve that has sizes enough: axis, domain, metric, value, low, high, verdict.

    Metrics: floor_nll, slope and exponent of y = floor + slope x^-exponent; state (`scaling.STATES`);
    misfit_nll, the root mean square distance of the sizes from it. At the largest size: foretold_nll, by a
    law that has not seen it, held_nll, that one's error, naive_nll, the error of the value before it,
    gain_nll, naive less held, with its verdict. And sizes_count, units_count (clips, or domains),
    seeds_count.
    """
    rng, rows, none = np.random.default_rng(seed), [], (math.nan, math.nan, "")
    for curve in curves:
        if len(curve.x) < scaling.POINTS:
            continue
        found, (sizes, seeds, units) = scaling.judge_curve(curve.x, curve.values, rng, resamples), (
            curve.values.shape)  # fmt: skip
        law = found.law
        counts = {"sizes_count": sizes, "seeds_count": seeds, "units_count": units}
        misfit = np.sqrt(np.mean((law(curve.x) - curve.values.mean(axis=(1, 2))) ** 2))
        told = {"floor_nll": law.a, "slope": law.b, "misfit_nll": misfit, "foretold_nll": found.foretold,
                "held_nll": found.held, "naive_nll": found.naive}  # fmt: skip
        cells = [(name, f"{float(value):.8g}", *none) for name, value in {**told, **counts}.items()]
        cells.append(("exponent", f"{float(law.c):.8g}", found.c_low, found.c_high, ""))
        cells.append(("state", found.state, *none))
        gain = f"{found.naive - found.held:.8g}"
        cells.append(("gain_nll", gain, found.gain_low, found.gain_high, found.verdict))
        rows += [(curve.axis, curve.domain, *cell) for cell in cells]
    return pd.DataFrame(rows, columns=["axis", "domain", "metric", "value", "low", "high", "verdict"])


def base_rates(sweep: Sequence[StoredRun]) -> pd.DataFrame:
    """The learning rate of each base on each domain, by validation NLL: domain, arm, bits, learning_rate,
    metric, value; empty without a sweep."""
    columns = ["domain", "arm", "bits", "learning_rate", "metric", "value"]
    return rate_study.choose(sweep).assign(metric="nll")[columns]


def judge_bases(runs: Sequence[StoredRun], values: Callable | None = None) -> pd.DataFrame:
    """That each base, tuned, beats the next smaller one: what `comparison.judge` has; empty without two."""
    size = {run.settings.method: run.cost["base_parameters"] for run in runs}
    order = sorted(size, key=size.__getitem__)
    claims = [{"a": b, "b": a, "claim": "greater"} for a, b in itertools.pairwise(order)]
    return comparison.judge(runs, claims, values=values) if claims else pd.DataFrame()


def overall(fitted: pd.DataFrame, bases: pd.DataFrame | None = None) -> pd.DataFrame:
    """How the fits fell: of, metric, value. Of "exponent": how many curves are in each state, and which; of
    "held": on how many the law foretells the largest size better than the value before it, or worse; of
    "bases": how many steps to the next larger base there are (`judge_bases`), and the verdicts on them."""
    states = fitted[fitted["metric"] == "state"]
    gains = fitted[fitted["metric"] == "gain_nll"]
    told = {"exponent": (states, "value", scaling.STATES),
            "held": (gains, "verdict", ("supported", "denied", "undecided"))}  # fmt: skip
    rows = []
    for of, (table, column, words) in told.items():
        rows.append((of, "curves_count", str(len(table))))
        for word in words:
            own = table[table[column] == word]
            names = [f"{axis} ({domain})" for axis, domain in zip(own["axis"], own["domain"], strict=True)]
            key = word.replace(" ", "-")
            rows += [(of, f"{key}_count", str(len(own))), (of, f"{key}_names", ", ".join(names) or "none")]
    steps = pd.DataFrame(columns=["verdict"]) if bases is None or bases.empty else bases
    rows.append(("bases", "steps_count", str(len(steps))))
    for word in ("supported", "denied", "undecided"):
        own = steps[steps["verdict"] == word]
        names = [f"{row.comparison.replace('_vs_', ' over ')} ({row.domain})" for row in own.itertuples()]
        rows.append(("bases", f"{word}_count", str(len(own))))
        rows.append(("bases", f"{word}_names", ", ".join(names) or "none"))
    return pd.DataFrame(rows, columns=["of", "metric", "value"])


# -- what quality costs


def arms_by_cost(results: Path) -> pd.DataFrame:
    """Every trained arm with its loss and its costs, in groups of one recipe: recipe, domain, notebook (of
    COMPARED), arm, seeds, nll, low, high, a column for each of COSTS, and `front_<cost>`: no arm of the
    recipe and domain is at most as dear and as bad.

    recipe: a name of RECIPES, for all arms of any notebook that were trained and scored as that notebook's
    are; a notebook whose recipe is the same as another's so appears under both names.
    """
    there = [name for name, (folder, (_, cost, _)) in COMPARED.items()
             if Path(results, folder, f"{cost}.csv").is_file()]  # fmt: skip
    found = pd.concat([_arms(Path(results), name) for name in there], ignore_index=True)
    parts = []
    for recipe, notebook in RECIPES.items():
        own = found[found["notebook"] == notebook]
        if own.empty:
            continue
        same = (found[RECIPE] == own[RECIPE].iloc[0]).all(axis=1)
        for _, group in found[same].groupby("domain", sort=False):
            on = {f"front_{cost}": scaling.front(group[cost], group["nll"]) for cost in COSTS}
            parts.append(group.assign(recipe=recipe, **on))
    columns = ["recipe", "domain", "notebook", "arm", "seeds", "nll", "low", "high", *COSTS]
    return pd.concat(parts, ignore_index=True)[[*columns, *(f"front_{cost}" for cost in COSTS), *RECIPE]]


def _arms(results: Path, notebook: str) -> pd.DataFrame:
    """Arms of one of COMPARED: notebook, domain, arm, RECIPE, seeds, COSTS, nll, low, high."""
    folder, files = COMPARED[notebook]
    runs, cost, summary = (pd.read_csv(results / folder / f"{name}.csv") for name in files)
    by = ["domain", "arm"]
    nll = summary[summary["metric"] == "nll"].set_index(by)[["value", "low", "high"]].astype(float)
    seeds = runs.groupby(by)["seed"].nunique().rename("seeds")
    told = runs.groupby(by)[RECIPE].first().join(cost.groupby(by)[[*COSTS]].first()).join(seeds).join(nll)
    told = told.rename(columns={"value": "nll"}).dropna(subset=[*COSTS, "nll"]).reset_index()
    return told[~told["arm"].isin(LEFT_OUT.get(notebook, ()))].assign(notebook=notebook)


def fronts(arms: pd.DataFrame) -> pd.DataFrame:
    """How many arms there are, how many are on each front, and the dearest over the cheapest: recipe, domain,
    metric, value."""
    rows = []
    for (recipe, domain), own in arms.groupby(["recipe", "domain"], sort=False):
        rows.append((recipe, domain, "arms_count", len(own)))
        rows += [(recipe, domain, f"front_{cost}_count", int(own[f"front_{cost}"].sum())) for cost in COSTS]
        rows += [(recipe, domain, f"{cost}_spread", own[cost].max() / own[cost].min()) for cost in COSTS]
    return pd.DataFrame(rows, columns=["recipe", "domain", "metric", "value"])
