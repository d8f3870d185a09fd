"""Aims and claims of what QLoRA costs, held against measured steps: a verdict each, computed.

    judged = judge_claims(table, ratios, quality_losses(runs))
    judge_aims(table, ratios, "SmolVLM-135M", frames=16, rank=8)

A claim names an interval. It is supported where all that was measured lies inside, denied where all lies
outside, and undecided where settings differ or the spread of a measurement crosses an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vqlora.cost.bench_tables import SETTING
from vqlora.stats import interval

OURS = "vqlora+lean"
AIMS = {  # name: (arm, against, what, at most)
    "peak": (OURS, "qlora", "peak_bytes", 0.5),
    "time": (OURS, "qlora", "cpu_s", 0.7),
    "total": (OURS, "full", "total_bytes", 0.2),
}
QUALITY = ("token_accuracy_frac", "slot_frac", "cider", "qa_frac")
_OPEN = float("inf")


@dataclass(frozen=True)
class Claim:
    """What is said of QLoRA: `low` to `high` is the interval that it names; most: of most settings only."""

    name: str
    text: str
    low: float
    high: float
    most: bool = False


CLAIMS = (
    Claim("weights", "4-bit weights take about 25% of 16 bits", 0.20, 0.30),
    Claim("adapters", "adapters are 1-5% of the base", 0.01, 0.05),
    Claim("total", "60-65% less memory than full fine-tuning", 0.60, 0.65),
    Claim("held", "83% less for weights, adapters and gradients", 0.80, 0.86),
    Claim("checkpointing", "checkpointing saves about 20% more", 0.15, 0.25),
    Claim("slower", "10-20% slower than full fine-tuning", 0.10, 0.20),
    Claim("unpacking", "10-20% slower than in 16 bits, by unpacking", 0.10, 0.20),
    Claim("quality", "less than 1% of quality lost on most tasks", -_OPEN, 0.01, most=True),
)


def verdict(measured: Sequence[tuple[float, float]], low: float, high: float, most: bool = False) -> str:
    """"supported", "denied" or "undecided" of `low` to `high`, from a spread (least, largest) a setting.

    most: more than half of the settings are enough. Without any the answer is "undecided".

    >>> verdict([(0.61, 0.62)], 0.60, 0.65), verdict([(0.64, 0.66)], 0.60, 0.65)
    ('supported', 'undecided')
    """
    inside = [low <= least and largest <= high for least, largest in measured]
    outside = [largest < low or least > high for least, largest in measured]
    for word, found in (("supported", inside), ("denied", outside)):
        if found and (all(found) or (most and 2 * sum(found) > len(found))):
            return word
    return "undecided"


def judge_aims(ratios: pd.DataFrame, model: str, frames: int, rank: int) -> pd.DataFrame:
    """The aims at one setting: aim, arm, against, metric ("ratio"), value, low, high, limit, verdict."""
    here = ratios[(ratios["model"] == model) & (ratios["frames"] == frames) & (ratios["rank"] == rank)]
    rows = []
    for aim, (arm, against, what, limit) in AIMS.items():
        row = here[(here["arm"] == arm) & (here["against"] == against) & (here["what"] == what)].iloc[0]
        word = verdict([(row["low"], row["high"])], 0.0, limit)
        rows.append({"aim": aim, "metric": "ratio", "value": row["median"], "low": row["low"],
                     "high": row["high"], "limit": limit, "verdict": word, "arm": arm, "against": against,
                     "what": what})  # fmt: skip
    return pd.DataFrame(rows)


def judge_claims(table: pd.DataFrame, ratios: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Every claim: claim, metric ("measured_frac"), value (median over settings), low, high (extremes),
    stated_low_frac, stated_high_frac, settings_count, verdict, text."""
    measured = measured_claims(table, ratios, losses)
    rows = []
    for claim in CLAIMS:
        own = measured[measured["claim"] == claim.name]
        ends = list(own[["low", "high"]].itertuples(index=False, name=None))
        rows.append({
            "claim": claim.name, "metric": "measured_frac", "value": own["value"].median(),
            "low": own["low"].min(), "high": own["high"].max(),
            "stated_low_frac": claim.low if np.isfinite(claim.low) else np.nan,
            "stated_high_frac": claim.high, "settings_count": len(own),
            "verdict": verdict(ends, claim.low, claim.high, claim.most), "text": claim.text,
        })  # fmt: skip
    return pd.DataFrame(rows)


def measured_claims(table: pd.DataFrame, ratios: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """The quantity of every claim in every setting that was measured: claim, of, value, low, high."""
    rows = []
    for setting, group in table.groupby(SETTING, sort=False):
        arms = group.set_index("arm")
        where = ", ".join(f"{name} {value}" for name, value in zip(SETTING, setting, strict=True))
        held = held_fractions(arms)
        rows += [(claim, where, value, value, value) for claim, value in held.items()]
        own = ratios[(ratios[SETTING] == list(setting)).all(axis=1) & (ratios["what"] == "cpu_s")]
        for claim, against in (("slower", "full"), ("unpacking", "lora")):
            timed = own[(own["arm"] == "qlora") & (own["against"] == against)]
            rows += [(claim, where, row.median - 1, row.low - 1, row.high - 1)
                     for row in timed[["median", "low", "high"]].itertuples(index=False)]  # fmt: skip
    rows += [("quality", f"{row.metric}, {row.domain}", row.value, row.low, row.high)
             for row in losses.itertuples(index=False)]  # fmt: skip
    return pd.DataFrame(rows, columns=["claim", "of", "value", "low", "high"])


def held_fractions(arms: pd.DataFrame) -> dict[str, float]:
    """Claims about memory in one setting, from its costs by arm; those whose arms were measured.

    Full fine-tuning holds float32 weights; the claims set 16-bit weights and gradients against QLoRA's.
    """
    found = {}
    if {"qlora", "full"} <= set(arms.index):
        qlora, full = arms.loc["qlora"], arms.loc["full"]
        half = full["weights_bytes"] / 2  # in 16 bits
        packed = qlora["weights_bytes"] + qlora["constants_bytes"]
        adapters = 4 * qlora["trainable_parameters"]
        found = {
            "weights": packed / half,
            "adapters": qlora["trainable_parameters"] / full["trainable_parameters"],
            "total": 1 - qlora["total_bytes"] / full["total_bytes"],
            "held": 1 - (packed + 2 * adapters) / (2 * half),
        }
    if {OURS, f"{OURS}+ckpt"} <= set(arms.index):
        saved = arms.loc[f"{OURS}+ckpt", "total_bytes"] / arms.loc[OURS, "total_bytes"]
        found["checkpointing"] = 1 - saved
    return found


def quality_losses(
    runs: pd.DataFrame, metrics: Iterable[str] = QUALITY, arm: str = "qlora", against: str = "full"
) -> pd.DataFrame:
    """Share of `against`'s quality that `arm` lacks, paired by seed: domain, metric, value, low, high, seeds.

    runs: notebook 03's runs.csv; those in which `against` scores nothing are left out. Intervals (95%, by t)
        are over seeds; one seed alone has none (NaN ends decide nothing).
    """
    rows = []
    for domain, own in runs.groupby("domain", sort=False):
        for metric in metrics:
            wide = own.pivot(index="seed", columns="arm", values=metric)
            wide = wide[wide[against] > 0]  # of nothing there is no share
            lost = (1 - wide[arm] / wide[against]).dropna()
            if len(lost):
                found = interval(lost.to_numpy()[:, None], np.random.default_rng(0))
                rows.append((domain, metric, found.mean, found.low, found.high, len(lost)))
    return pd.DataFrame(rows, columns=["domain", "metric", "value", "low", "high", "seeds"])
