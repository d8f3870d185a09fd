"""From finished runs to what a comparison reports: means with intervals and planned tests.

    summary = summarise(runs)                        # domain, arm, metric, value, low, high
    tests = judge(runs, planned_claims(margin_nll=0.05))

The frames that come back are the results files of the notebook, columns and all; `vqlora.report` reads them
by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from vqlora import stats
from vqlora.store import StoredRun

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
