"""What notebook 09 asks of its runs: how large ranks must be, and which part of the model needs them.

    rates = settle(placement, sweep, own, committed)            # domain, arm, bits, learning_rate, origin
    runs = run_grid(rated(placement.runs(), rates), here.store, here.profile)
    claims = planned("language", margin_nll=0.05, arms=names)   # family, then the claims about pairs of arms
    tests = judge(runs, margin_nll=0.05)                        # domain, comparison, .., verdict, family
    sizes(runs)                                                 # arm, modality: layers, ranks, parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from vqlora import comparison, stats
from vqlora.config import RunSettings
from vqlora.experiments import MainSettings
from vqlora.store import StoredRun, write_csv
from vqlora.studies.rank_study import ranks_of

ALL = "rank-4"  # ranks of 4 on all layers: what the budget of a single part buys there
PARTS = ("vision", "fusion", "text")
CALLED_FOR = {"language": "text", "visual": "vision"}  # the part that a domain's shift is thought to need

RATED = ["domain", "arm", "bits"]


# -- rates


def settle(
    compared: MainSettings, sweep: Sequence[StoredRun], own: Path, committed: Path
) -> pd.DataFrame:
    """The learning rate of every arm on every domain: from this profile's sweep, else the committed one, else
    the profile. Returns domain, arm, bits, learning_rate, origin.

    One rate for all domains would be decided by the one with the largest losses; one that was not swept takes
    that of a domain that was. The result of a sweep is written to ``own``.
    """
    own.unlink(missing_ok=True)
    if sweep:
        domains = dict.fromkeys(run.settings.domain for run in sweep)
        found = [comparison.choose_rates([run for run in sweep if run.settings.domain == domain])
                 .assign(domain=domain) for domain in domains]  # fmt: skip
        write_csv(own, pd.concat(found)[[*RATED, "learning_rate", "value"]])
    path = next((path for path in (own, committed) if path.is_file()), None)
    known = pd.read_csv(path) if path else pd.DataFrame(columns=[*RATED, "learning_rate"])
    word, rows = "sweep" if path == own else "committed sweep", []
    for domain in compared.domains:
        for arm in compared.arms:
            label = arm.label or arm.arm
            swept = known[(known["arm"] == label) & (known["bits"] == arm.bits)].set_index("domain")
            at = domain if domain in swept.index else next(iter(swept.index), None)
            rate = arm.learning_rate if at is None else float(swept.loc[at, "learning_rate"])
            origin = "profile" if at is None else word if at == domain else f"{word} on {at}"
            rows.append((domain, label, arm.bits, rate, origin))
    return pd.DataFrame(rows, columns=[*RATED, "learning_rate", "origin"])


def rated(
    runs: Iterable[RunSettings], rates: pd.DataFrame, arm: str | None = None
) -> tuple[RunSettings, ...]:
    """The runs with the rates of their domains and arms, or of one `arm` for all."""
    known = rates.set_index(RATED)["learning_rate"]
    return tuple(
        run.model_copy(update={"learning_rate": float(known[run.domain, arm or run.method, run.bits])})
        for run in runs
    )


def sweep_table(sweep: Sequence[StoredRun], rates: pd.DataFrame, committed: Path) -> pd.DataFrame:
    """Every swept rate with its validation NLL: domain, arm, learning_rate, metric, value, chosen.

    Without a sweep in this profile, the committed table; without that, an empty one.
    """
    columns = ["domain", "arm", "learning_rate", "metric", "value"]
    if sweep:
        settings = [run.settings for run in sweep]
        rows = [(s.domain, s.method, s.learning_rate, "nll", run.metrics["nll"])
                for s, run in zip(settings, sweep, strict=True)]  # fmt: skip
        table = pd.DataFrame(rows, columns=columns).groupby(columns[:4], as_index=False)["value"].mean()
    else:
        table = pd.read_csv(committed)[columns] if committed.is_file() else pd.DataFrame(columns=columns)
    used = {(row.domain, row.arm, f"{row.learning_rate:g}") for row in rates.itertuples()}
    tried = zip(table["domain"], table["arm"], table["learning_rate"], strict=True)
    return table.assign(chosen=[(domain, arm, f"{rate:g}") in used for domain, arm, rate in tried])


# -- claims


def planned(domain: str, margin_nll: float, arms: Sequence[str]) -> dict[str, list[dict]]:
    """Comparisons on NLL by family, written down before any run; of them those between `arms` there are.

    primary: rank 64 is no worse than rank 4; the part that the shift calls for, alone, is no worse than all
    parts with the same parameters; all parts beat the part that another shift calls for. beside: rank 4 beats
    rank 1 and rank 16 beats rank 4; all parts beat fusion alone.
    """
    right = CALLED_FOR.get(domain)
    wrong = [part for part in CALLED_FOR.values() if right and part != right]
    primary = [("rank-64", ALL, "no_worse")]
    primary += [(right, ALL, "no_worse")] if right else []
    primary += [(ALL, part, "greater") for part in wrong]
    beside = [(ALL, "rank-1", "greater"), ("rank-16", ALL, "greater"), (ALL, "fusion", "greater")]
    families = {"primary": primary, "beside": beside}
    return {
        family: [{"a": a, "b": b, "claim": claim, "margin": margin_nll}
                 for a, b, claim in pairs if {a, b} <= set(arms)]
        for family, pairs in families.items()
    }  # fmt: skip


def judge(
    runs: Sequence[StoredRun], margin_nll: float, *, values: Callable | None = None
) -> pd.DataFrame:
    """Tests as `comparison.judge` makes them, with their family; Holm's correction is within a family, over
    all domains. Denied is also a gain whose interval lies below the margin."""
    parts = []
    for domain in dict.fromkeys(run.settings.domain for run in runs):
        own = [run for run in runs if run.settings.domain == domain]
        for family, claims in planned(domain, margin_nll, [run.settings.method for run in own]).items():
            if claims:
                parts.append(comparison.judge(own, claims, values=values).assign(family=family))
    if not parts:
        raise ValueError("no two arms of a planned comparison among the runs")
    return stats.corrected(pd.concat(parts, ignore_index=True), "family")


def sizes(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """What each arm that was given a budget bought with it: arm, modality, layers, rank_low, rank_high,
    trainable_parameters (of the whole arm)."""
    budgeted = [run for run in runs if run.settings.budget is not None]
    found = ranks_of(budgeted)
    found = found[found["rank"] > 0].drop_duplicates(["arm", "layer"])
    table = found.groupby(["arm", "modality"])["rank"].agg(["size", "min", "max"]).reset_index()
    spent = {run.settings.method: run.cost["trainable_parameters"] for run in budgeted}
    table.columns = ["arm", "modality", "layers", "rank_low", "rank_high"]
    return table.assign(trainable_parameters=[int(spent[arm]) for arm in table["arm"]])
