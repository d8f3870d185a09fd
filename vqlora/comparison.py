"""From finished runs to what a comparison reports: means with intervals, planned tests, learning rates.

    summary = summarise(runs)                        # domain, arm, metric, value, low, high
    tests = judge(runs, planned_claims(margin_nll=0.05))
    rates = settle_rates(main, sweep, ...)           # the learning rate of each arm, and where it is from

The frames that come back are the results files of the notebook, columns and all; `vqlora.report` reads them
by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora import stats
from vqlora.config import arm_name, swept_rates
from vqlora.experiments import MainSettings
from vqlora.store import StoredRun, write_csv

CLIP_METRICS = tuple(
    "nll token_accuracy_frac slot_frac exact_frac rouge_l cider qa_frac "
    "t2v_r1 t2v_r5 t2v_r10 t2v_map v2t_r1 v2t_r5 v2t_r10 v2t_map".split()
)
# Not means over the same clips in every run; order_frac is over clips whose events were all told.
CORPUS_METRICS = tuple("order_frac bleu1 bleu2 bleu3 bleu4 meteor t2v_median_rank v2t_median_rank".split())
SHARED = tuple(
    "rank alpha dropout steps batch_size accumulation warmup_steps schedule weight_decay contrastive_weight "
    "question_share frames select train_clips eval_clips eval_part".split()
)


def clip_values(runs: Iterable[StoredRun], metric: str, values: Callable | None = None) -> pd.DataFrame:
    """One row per run and item of a metric that is a mean over items: domain, arm, seed, clip, value.

    values: examples, metric -> columns clip and value; `vqlora.metrics.metric_values` unless given.
    """
    if values is None:
        from vqlora.metrics import metric_values as values
    parts = []
    for run in runs:
        part = values(run.examples(), metric)
        parts.append(part.assign(domain=run.settings.domain, arm=run.settings.method, seed=run.settings.seed))
    return pd.concat(parts, ignore_index=True)[["domain", "arm", "seed", "clip", "value"]]


def arm_names(runs: Sequence[StoredRun]) -> dict[tuple[str, str], str]:
    """Name of each (method, bits): the method alone, with its bits where it comes in several."""
    pairs = {(run.settings.method, run.settings.bits) for run in runs}
    alone = {arm: len([pair for pair in pairs if pair[0] == arm]) == 1 for arm, _ in pairs}
    return {(arm, bits): arm if alone[arm] else f"{arm}-{bits}" for arm, bits in sorted(pairs)}


def summarise(
    runs: Sequence[StoredRun],
    *,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    values: Callable | None = None,
) -> pd.DataFrame:
    """Every metric of every arm on every domain: domain, arm, metric, value, low, high.

    Means over clips get the 95% interval of `stats.interval` over seeds and clips. A corpus score is the mean
    over seeds; where examples have it per clip (METEOR, BLEU-4) it gets their interval, moved to the corpus
    score. Bytes and parameter counts get none.

    Args:
        metrics: names of `CLIP_METRICS` and `CORPUS_METRICS` to report; all that the runs have unless given.
        seed: of the bootstrap.
        values: see `clip_values`.

    Raises:
        ValueError: no runs, or an arm that lacks a metric or a seed that others have.
    """
    if not runs:
        raise ValueError("no runs to summarise")
    names, rows, rng = arm_names(runs), [], np.random.default_rng(seed)
    have = [name for name in (*CLIP_METRICS, *CORPUS_METRICS) if any(name in run.metrics for run in runs)]
    for domain, (pair, arm) in _cells(runs, names):
        own = [
            run
            for run in runs
            if run.settings.domain == domain and (run.settings.method, run.settings.bits) == pair
        ]
        for metric in have if metrics is None else metrics:
            lacking = [run.settings.name for run in own if metric not in run.metrics]
            if lacking:
                raise ValueError(f"{lacking[0]}: no metric {metric!r}, which other runs have")
            if metric in CLIP_METRICS:
                found = stats.interval(stats.crossed(clip_values(own, metric, values), arm).to_numpy(), rng)
                low, high = found.low, found.high
                if metric not in ("nll", "cider"):  # a share: an interval may not leave what is possible
                    low, high = max(low, 0.0), min(high, 1.0)
                rows.append((domain, arm, metric, found.mean, low, high))
            else:
                rows.append((domain, arm, metric, *_corpus(own, metric, rng)))
        rows += [(domain, arm, metric, value, math.nan, math.nan) for metric, value in _cost(own).items()]
    return pd.DataFrame(rows, columns=["domain", "arm", "metric", "value", "low", "high"])


def _cells(runs: Sequence[StoredRun], names: Mapping[tuple[str, str], str]):
    domains = dict.fromkeys(run.settings.domain for run in runs)
    return [
        (domain, item)
        for domain in domains
        for item in names.items()
        if any(r.settings.domain == domain and (r.settings.method, r.settings.bits) == item[0] for r in runs)
    ]


def _corpus(runs: Sequence[StoredRun], metric: str, rng) -> tuple[float, float, float]:
    scores, parts = [run.metrics[metric] for run in runs], []
    score = math.nan if np.isnan(scores).all() else float(np.nanmean(scores))
    for run in runs:
        examples = run.examples()
        if metric not in examples.columns:
            return score, math.nan, math.nan
        captions = examples[examples["task"] == "caption"]
        parts.append(
            pd.DataFrame({"seed": run.settings.seed, "clip": captions["clip"], "value": captions[metric]})
        )
    found = stats.interval(stats.crossed(pd.concat(parts, ignore_index=True)).to_numpy(), rng)
    return score, score + found.low - found.mean, score + found.high - found.mean


def _cost(runs: Sequence[StoredRun]) -> dict[str, float]:
    """Counted costs, equal in all runs of an arm: bytes of a step and of the model, trained share."""
    cost = {**runs[0].metrics, **runs[0].cost}
    names = ("weight_bytes", "train_bytes", "trainable_frac", "trainable_parameters", "step_flops")
    return {name: float(cost[name]) for name in names if name in cost}


def planned_claims(margin_nll: float) -> list[dict]:
    """The primary comparisons of the main experiment, per domain, on NLL; written down before any run.

    margin_nll: nats per token within which QLoRA and LoRA count as equivalent.
    """
    return [
        {"a": "qlora", "b": "lora", "claim": "equivalent", "margin": margin_nll},
        {"a": "lora", "b": "frozen", "claim": "greater"},
        {"a": "qlora", "b": "frozen", "claim": "greater"},
    ]


def judge(
    runs: Sequence[StoredRun],
    claims: Sequence[Mapping],
    *,
    metric: str = "nll",
    better: str = "lower",
    seed: int = 0,
    values: Callable | None = None,
) -> pd.DataFrame:
    """Test the claims on every domain of the runs; Holm over all domains and claims together.

    Returns:
        domain, comparison (`qlora_vs_lora`), metric, value (gain, positive where the first arm is better),
        low, high, claim, margin (empty without one), p, p_holm, smallest_effect, verdict.
    """
    rng, parts = np.random.default_rng(seed), []
    for domain in dict.fromkeys(run.settings.domain for run in runs):
        own = [run for run in runs if run.settings.domain == domain]
        parts.append(
            stats.compare(clip_values(own, metric, values), claims, rng, better=better).assign(domain=domain)
        )
    table = stats.corrected(pd.concat(parts, ignore_index=True))
    table["comparison"], table["metric"] = table["a"] + "_vs_" + table["b"], metric
    table["margin"] = table["margin"].where(table["margin"] > 0)
    return table.rename(columns={"difference": "value"})[
        [
            "domain",
            "comparison",
            "metric",
            "value",
            "low",
            "high",
            "claim",
            "margin",
            "p",
            "p_holm",
            "smallest_effect",
            "verdict",
        ]
    ]


def choose_rates(sweep: Sequence[StoredRun], metric: str = "nll") -> pd.DataFrame:
    """The learning rate of each arm with the lowest mean of a loss over domains and seeds of a sweep.

    Returns:
        arm, bits, learning_rate, value (that mean). Raises ValueError for an empty sweep.
    """
    rows = [
        {
            "arm": run.settings.method,
            "bits": run.settings.bits,
            "learning_rate": run.settings.learning_rate,
            "value": run.metrics[metric],
        }
        for run in sweep
    ]
    if not rows:
        raise ValueError("no sweep to choose learning rates from")
    means = pd.DataFrame(rows).groupby(["arm", "bits", "learning_rate"], as_index=False)["value"].mean()
    return means.loc[means.groupby(["arm", "bits"])["value"].idxmin()].reset_index(drop=True)


def settle_rates(main: MainSettings, sweep: Sequence[StoredRun], own: Path, committed: Path) -> pd.DataFrame:
    """The learning rate of every arm: from this profile's sweep, else the committed one, else the profile.

    The result of a sweep is written to ``own``, where later notebooks of the profile find it.

    Returns:
        arm, bits, learning_rate, origin (`sweep`, `committed sweep` or `profile`), in the order of the
        profile.
    """
    own.unlink(missing_ok=True)
    if sweep:
        write_csv(own, choose_rates(sweep))
    rows = []
    for arm in main.arms:
        found = [
            (path, rates[arm.name]) for path in (own, committed) if arm.name in (rates := swept_rates(path))
        ]
        origin = "profile" if not found else "sweep" if found[0][0] == own else "committed sweep"
        rows.append((arm.label or arm.arm, arm.bits, found[0][1] if found else arm.learning_rate, origin))
    return pd.DataFrame(rows, columns=["arm", "bits", "learning_rate", "origin"])


def rates_by_name(rates: pd.DataFrame) -> dict[str, float]:
    """What `settle_rates` gives as a mapping from arm name (`qlora-nf4`) to learning rate."""
    names = map(arm_name, rates["arm"], rates["bits"])
    return dict(zip(names, rates["learning_rate"], strict=True))


def sweep_table(
    sweep: Sequence[StoredRun],
    rates: pd.DataFrame,
    domains: Sequence[str],
    committed: Path,
    metric: str = "nll",
) -> pd.DataFrame:
    """Every swept rate with its loss: domain, arm, learning_rate, metric, value, chosen (it is the one used).

    Without a sweep in this profile the committed table is taken; without that, the rates used, with no loss.
    """
    used = dict(zip(rates["arm"], rates["learning_rate"], strict=True))
    if sweep:
        table = pd.DataFrame(
            [
                {
                    "domain": run.settings.domain,
                    "arm": run.settings.method,
                    "learning_rate": run.settings.learning_rate,
                    "value": run.metrics[metric],
                }
                for run in sweep
            ]
        )
        table = table.groupby(["domain", "arm", "learning_rate"], as_index=False)["value"].mean()
    elif committed.is_file():
        table = pd.read_csv(committed)
        table = table[table["metric"] == metric]
    else:
        table = pd.DataFrame(
            [(domain, arm, rate, math.nan) for domain in domains for arm, rate in used.items() if rate],
            columns=["domain", "arm", "learning_rate", "value"],
        )
    chosen = [
        math.isclose(used.get(arm, math.nan), rate)
        for arm, rate in zip(table["arm"], table["learning_rate"], strict=True)
    ]
    return table.assign(metric=metric, chosen=chosen)[
        ["domain", "arm", "learning_rate", "metric", "value", "chosen"]
    ]


def shared_settings(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Settings that all trained runs share, and the number of seeds: metric, value."""
    trained = [run.settings for run in runs if run.settings.arm != "frozen"]
    rows = [("seeds", len({settings.seed for settings in trained}))]
    rows += [
        (name, getattr(trained[0], name))
        for name in SHARED
        if len({str(getattr(settings, name)) for settings in trained}) == 1
    ]
    return pd.DataFrame(rows, columns=["metric", "value"])
