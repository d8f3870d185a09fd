"""Invented results of notebooks 09 and 10, for tests of the report and of what 10 reads."""

from pathlib import Path

import numpy as np
import pandas as pd

from vqlora.store import write_csv
from vqlora.studies import scaling_study

ARMS = {"rank-1": (1.30, 25_536), "rank-4": (1.10, 102_144), "rank-16": (1.09, 408_576),
        "rank-64": (1.085, 1_634_304), "vision": (1.4, 102_016), "fusion": (1.5, 101_952),
        "text": (1.08, 102_144)}  # fmt: skip
RECIPE = {"steps": 40, "batch_size": 16, "train_clips": 1200, "eval_part": "test", "eval_clips": 160,
          "frames": 8, "compute_dtype": "fp32"}  # fmt: skip


def write_arms(
    folder: Path,
    arms: dict[str, tuple[float, int]],
    files: tuple[str, ...] = ("runs", "cost", "summary"),
    **changed,
) -> None:
    """`runs.csv`, `cost.csv` and `summary.csv` of arms with these losses and trainable parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = ("language", "visual")
    named = [(domain, arm, seed) for domain in domains for arm in arms for seed in (0, 1, 2)]
    runs = pd.DataFrame(named, columns=["domain", "arm", "seed"]).assign(bits="nf4", **{**RECIPE, **changed})
    count = runs["arm"].map(lambda arm: arms[arm][1])
    costs = {"key": [f"{n:016x}" for n in range(len(runs))], "train_bytes": 1e8 + 16.0 * count,
             "step_flops": 1e10 + 2.0 * count, "trainable_parameters": count, "train_cpu_s": 9.0,
             "eval_cpu_s": 3.0, "resident_peak_bytes": 1e9}  # fmt: skip
    rows = [(domain, arm, *cell) for domain in domains for arm, (nll, size) in arms.items()
            for cell in (("nll", nll, nll - 0.03, nll + 0.03), ("trainable_parameters", size, np.nan, np.nan),
                         ("train_bytes", 1e8 + 16.0 * size, np.nan, np.nan),
                         ("step_flops", 1e10 + 2.0 * size, np.nan, np.nan))]  # fmt: skip
    columns = ["domain", "arm", "metric", "value", "low", "high"]
    cost, summary = runs[["domain", "arm", "seed"]].assign(**costs), pd.DataFrame(rows, columns=columns)
    for name, frame in zip(files, (runs, cost, summary), strict=True):
        write_csv(folder / f"{name}.csv", frame)


def write_placement(folder: Path) -> None:
    write_arms(folder, ARMS)
    rates = [(domain, arm, "nf4", 1e-2, "sweep") for domain in ("language", "visual") for arm in ARMS]
    columns = ["domain", "arm", "bits", "learning_rate", "origin"]
    write_csv(folder / "lr.csv", pd.DataFrame(rates, columns=columns))
    sizes = [("vision", "vision", 24, 11, 12, 102_016), ("fusion", "fusion", 2, 59, 59, 101_952),
             ("text", "text", 28, 7, 7, 102_144)]  # fmt: skip
    columns = ["arm", "modality", "layers", "rank_low", "rank_high", "trainable_parameters"]
    write_csv(folder / "sizes.csv", pd.DataFrame(sizes, columns=columns))
    claims = [("primary", domain, a, b, claim) for domain, right, wrong in (
        ("language", "text", "vision"), ("visual", "vision", "text")) for a, b, claim in (
        ("rank-64", "rank-4", "no_worse"), (right, "rank-4", "no_worse"), ("rank-4", wrong, "greater"))]
    claims += [("beside", domain, "rank-16", "rank-4", "greater") for domain in ("language", "visual")]
    claims += [("beside", "visual", "rank-4", "fusion", "greater")]
    tests = pd.DataFrame([(domain, f"{a}_vs_{b}", "nll", ARMS[b][0] - ARMS[a][0], claim, family)
                          for family, domain, a, b, claim in claims],
                         columns=["domain", "comparison", "metric", "value", "claim", "family"])  # fmt: skip
    tests = tests.assign(low=tests["value"] - 0.02, high=tests["value"] + 0.02, margin=0.05, p=0.01)
    tests = tests.assign(p_holm=0.02, smallest_effect=0.04, verdict="supported")
    shown = ["domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p", "p_holm",
             "smallest_effect", "verdict", "family"]  # fmt: skip
    write_csv(folder / "tests.csv", tests[shown])


def write_scaling(results: Path) -> None:
    """What notebook 10 makes of made-up curves, by its own functions, and of the arms of 09."""
    rng, folder = np.random.default_rng(0), results / "10_scaling"
    curves = []
    for axis, domain, x, loss in (
        ("rank", "visual", [1, 4, 16, 64], lambda x: 1.0 + 0.2 / x),
        ("clips", "language", [75, 150, 300, 600, 1200], lambda x: 1.0 + 20 / x),
        ("clips", "visual", [300, 1200], lambda x: 1.0 + 20 / x),
        ("base", "visual", [1e6, 3e6], lambda x: 0.5 + 1e6 / x),
    ):
        sizes = np.array(x, float)
        noise = rng.normal(0, 0.01, (len(x), 3, 1)) + rng.normal(0, 0.1, (1, 1, 20))
        curves.append(scaling_study.Sizes(axis, domain, sizes, loss(sizes)[:, None, None] + noise))
    fits = scaling_study.fits(curves, resamples=100)
    write_csv(folder / "points.csv", scaling_study.points(curves))
    write_csv(folder / "fits.csv", fits)
    rates = [("visual", name, "nf4", 1e-2, "nll", 0.5) for name in ("s", "m")]
    columns = ["domain", "arm", "bits", "learning_rate", "metric", "value"]
    write_csv(folder / "base_rates.csv", pd.DataFrame(rates, columns=columns))
    steps = [("visual", "m_vs_s", "nll", 0.66, 0.6, 0.7, "greater", np.nan, 0.01, 0.01, 0.05, "supported")]
    columns = ["domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p", "p_holm",
               "smallest_effect", "verdict"]  # fmt: skip
    bases = pd.DataFrame(steps, columns=columns)
    write_csv(folder / "bases.csv", bases)
    made = pd.DataFrame({"domain": "visual", "arm": ["s", "m"], "base_parameters": [1e6, 3e6]})
    write_csv(folder / "cost.csv", made)
    write_csv(folder / "summary.csv", scaling_study.overall(fits, bases))
    shared = results.with_name(f"{results.name}-shared")  # where 03 has the recipe, too
    write_arms(shared / "03_main", {"full": (0.9, 3_218_064), "qlora": (1.2, 204_288)}, steps=60)
    write_placement(shared / "09_rank_size_and_placement")
    arms = scaling_study.arms_by_cost(shared)
    write_csv(folder / "pareto.csv", arms)
    write_csv(folder / "fronts.csv", scaling_study.fronts(arms))
