"""What notebook 03 asks beside its main comparison: more methods by one short recipe, each against QLoRA.

    rates = settle(methods, sweep, own, committed)    # domain, arm, bits, learning_rate, origin
    runs = run_grid(runs_of(methods, rates, base), here.store, here.profile)
    for name, table in tables(methods, runs, domains).items(): ...    # results files by name

A profile without a section `methods` asks for nothing: every function takes None in its place, and no runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from vqlora import comparison
from vqlora.config import RunSettings
from vqlora.experiments import MainSettings
from vqlora.store import StoredRun, cost_frame, results_frame
from vqlora.studies import rate_study

EXPERIMENT = "03_more"
NAMES = {
    "full": "full fine-tuning",
    "lora": "16-bit LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "houlsby": "Houlsby adapters",
    "prefix": "prefix tuning",
    "posttrain-int8": "full, then int8",
    "posttrain-nf4": "full, then NF4",
}
WITH_BASE = "qlora"  # what every other method is held against
AFTER = "full"  # what is quantized after its training
COSTS = ("step_peak_bytes", "adapter_bytes", "quantized_bytes")  # counted, beside those of every summary
SUMMARY = ["domain", "arm", "metric", "value", "low", "high"]
TESTS = ["domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p", "p_holm",
         "smallest_effect", "verdict", "family"]  # fmt: skip


# -- runs and rates


def sweep_of(methods: MainSettings | None, base: str) -> tuple[RunSettings, ...]:
    """The sweep of learning rates, on validation."""
    return methods.sweep_runs(base=base, experiment=f"{EXPERIMENT}_sweep") if methods else ()


def runs_of(methods: MainSettings | None, rates: pd.DataFrame, base: str) -> tuple[RunSettings, ...]:
    """Every run of the comparison, at the rates of `settle`."""
    if not methods:
        return ()
    return rate_study.rated(methods.runs(base=base, experiment=EXPERIMENT), rates)


def settle(
    methods: MainSettings | None, sweep: Sequence[StoredRun], own: Path, committed: Path
) -> pd.DataFrame:
    """The rate of every arm on every domain as `rate_study.settle` finds it: RATES.

    Arms that quantize after full fine-tuning train as it does and take its rate.
    """
    if not methods:
        return pd.DataFrame(columns=rate_study.RATES)
    after = [arm.label or arm.arm for arm in methods.arms if arm.arm == "posttrain"]
    rates = rate_study.settle(methods, sweep, own, committed)
    return rate_study.taken_from(rates, dict.fromkeys(after, AFTER))


def sweep_table(
    methods: MainSettings | None, sweep: Sequence[StoredRun], rates: pd.DataFrame, committed: Path
) -> pd.DataFrame:
    """Every swept rate with its validation loss, as `rate_study.sweep_table`; empty without methods."""
    if not methods:
        return pd.DataFrame(columns=[*rate_study.TRIED, "chosen"])
    return rate_study.sweep_table(sweep, rates, committed)


# -- results


def tables(
    methods: MainSettings | None,
    runs: Sequence[StoredRun],
    domains: Sequence[str],
    *,
    values: Callable | None = None,
) -> dict[str, pd.DataFrame]:
    """Every results file of the comparison, by name; without a section only how it fell: not at all.

    domains: those that `more_overall` has a row for, whatever was run.
    """
    tests = judge(methods, runs, values=values)
    found = {"more_overall": overall(tests, domains)}
    if not runs:
        return found
    found |= {"more": summarise(runs, values=values), "more_tests": tests, "more_times": times(runs)}
    return found | {"more_runs": results_frame(runs), "more_cost": cost_frame(runs)}


def summarise(runs: Sequence[StoredRun], *, values: Callable | None = None) -> pd.DataFrame:
    """`comparison.summarise`, and of each arm COSTS where its runs have them: SUMMARY."""
    rows = {(run.settings.domain, run.settings.method, name): run.cost[name]
            for run in runs for name in COSTS if name in run.cost}  # fmt: skip
    more = pd.DataFrame([(*named, value, None, None) for named, value in rows.items()], columns=SUMMARY)
    found = comparison.summarise(runs, values=values)
    return pd.concat([found, more.astype({"low": float, "high": float})], ignore_index=True)


def times(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Processor seconds of an arm's training and evaluation, mean over its runs: arm, metric, value."""
    rows = [(run.settings.method, name, run.cost[name])
            for run in runs for name in ("train_cpu_s", "eval_cpu_s") if name in run.cost]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "metric", "value"])
    return frame.groupby(["arm", "metric"], as_index=False)["value"].mean()


def claims_of(methods: MainSettings) -> dict[str, list[dict]]:
    """The planned comparisons on NLL by family, written down before any run.

    methods: every method that trains in its bits beats QLoRA; denied where the gain is surely below the
    margin. posttrain: full fine-tuning loses no more than the margin when it is quantized, and still beats
    QLoRA in as few bits.
    """
    labels = {arm.label or arm.arm: arm for arm in methods.arms}
    after = [name for name, arm in labels.items() if arm.arm == "posttrain"]
    others = [name for name in labels if name not in (WITH_BASE, *after)]
    margin = {"margin": methods.margin_nll}
    found = {"methods": [{"a": name, "b": WITH_BASE, "claim": "greater", **margin} for name in others]}
    found["posttrain"] = [{"a": name, "b": AFTER, "claim": "no_worse", **margin} for name in after]
    found["posttrain"] += [{"a": name, "b": WITH_BASE, "claim": "greater", **margin} for name in after]
    return found


def judge(
    methods: MainSettings | None, runs: Sequence[StoredRun], *, values: Callable | None = None
) -> pd.DataFrame:
    """Tests as `comparison.judge` makes them, with their family, within which Holm corrects: TESTS."""
    parts = []
    for family, claims in claims_of(methods).items() if methods and runs else ():
        if claims:
            parts.append(comparison.judge(runs, claims, values=values).assign(family=family))
    return pd.concat(parts, ignore_index=True)[TESTS] if parts else pd.DataFrame(columns=TESTS)


def overall(tests: pd.DataFrame, domains: Sequence[str]) -> pd.DataFrame:
    """How the comparisons with QLoRA fell on each of `domains`: of (a domain), metric, value.

    claims_count, and names of the methods by verdict; worse_names: their whole interval lies below QLoRA.
    """
    rows = []
    for domain in domains:
        own = tests[(tests["family"] == "methods") & (tests["domain"] == domain)]
        groups = {verdict: own["verdict"] == verdict for verdict in ("supported", "denied", "undecided")}
        rows.append((domain, "claims_count", str(len(own))))
        for name, chosen in (groups | {"worse": own["high"] < 0}).items():
            arms = own.loc[chosen, "comparison"].str.removesuffix(f"_vs_{WITH_BASE}")
            rows.append((domain, f"{name}_names", ", ".join(NAMES.get(arm, arm) for arm in arms) or "none"))
    return pd.DataFrame(rows, columns=["of", "metric", "value"])
