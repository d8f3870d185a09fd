"""What notebook 16 asks of its runs: means by kind of question, planned claims.

    tests = judge(sound, runs)                         # domain, comparison, metric, .., verdict, family
    kinds(runs)                                        # domain, arm, metric (qa_when_frac), value, low, high
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora import comparison, stats
from vqlora.experiments import SoundSettings
from vqlora.metrics import metric_values
from vqlora.store import StoredRun

METRICS = ("nll", "slot_frac", "exact_frac", "qa_frac", "t2v_r1")
# What a question's answer is in, where only few frames are shown: how many tones there are, which and when; a
# picture; or both, as a tone does not say whose it is.
GROUPS = {"heard": ("direction", "count", "when"), "both": ("what", "order"), "seen": ("where", "still")}
VERDICTS = ("supported", "denied", "undecided")


# -- means


def summarise(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Means of every arm with intervals: domain, arm, metric, value, low, high."""
    return comparison.summarise(runs, metrics=METRICS)


def kinds(runs: Sequence[StoredRun], seed: int = 0) -> pd.DataFrame:
    """Accuracy by kind of question and by `GROUPS`, with 95% intervals over seeds and clips.

    domain, arm, metric (`qa_<kind>_frac`, `qa_<group>_frac`), value, low, high; kinds that no clip asks are
    left out.
    """
    rng, tables = np.random.default_rng(seed), []
    asked = runs[0].examples()
    asked = list(dict.fromkeys(asked.loc[asked["task"] == "question", "kind"]))
    groups = {name: tuple(kind for kind in kinds if kind in asked) for name, kinds in GROUPS.items()}
    for name, own in ({kind: (kind,) for kind in asked} | groups).items():
        if own:
            values = comparison.clip_values(runs, name, lambda rows, _, own=own: _of_kinds(rows, own))
            table = stats.summarise(values, rng, by=["domain", "arm"]).rename(columns={"mean": "value"})
            table[["low", "high"]] = table[["low", "high"]].clip(0, 1)
            tables.append(table.assign(metric=f"qa_{name}_frac"))
    return pd.concat(tables, ignore_index=True)[["domain", "arm", "metric", "value", "low", "high"]]


def _of_kinds(rows: pd.DataFrame, own: Sequence[str]) -> pd.DataFrame:
    return pd.concat([metric_values(rows, f"qa_{kind}_frac") for kind in own], ignore_index=True)


def lesson(base: Path, window: int = 20) -> pd.DataFrame:
    """How the base learned to listen (metric, value): steps, and mean loss of the first and last ones."""
    losses = json.loads((Path(base) / "losses.json").read_text(encoding="utf-8"))
    first, last = losses[:window], losses[-window:]
    rows = [("steps", len(losses)), ("first_nll", float(np.mean(first))), ("last_nll", float(np.mean(last)))]
    return pd.DataFrame(rows, columns=["metric", "value"])


# -- claims


def judge(sound: SoundSettings, runs: Sequence[StoredRun]) -> pd.DataFrame:
    """The claims tested on every domain and metric, as `comparison.judge` does it; Holm within a family.

    A gain is positive where the first arm is better; denied is also one whose interval lies below the margin.
    """
    margins, found = {"nll": sound.margin_nll, "qa_frac": sound.margin_frac}, []
    for claim in sound.claims:
        for metric in claim.metrics:
            asked = {"a": claim.a, "b": claim.b, "claim": claim.claim, "margin": margins[metric]}
            better = "lower" if metric == "nll" else "higher"
            tests = comparison.judge(runs, [asked], metric=metric, better=better)
            found.append(tests.assign(family=claim.family))
    return stats.corrected(pd.concat(found, ignore_index=True), "family")


def overall(tests: pd.DataFrame) -> pd.DataFrame:
    """Verdicts by family (of, metric, value): how many claims, how many and which of each verdict."""
    rows = []
    for family, own in tests.groupby("family", sort=False):
        rows.append((family, "claims_count", len(own)))
        for verdict in VERDICTS:
            held = own[own["verdict"] == verdict]
            told = {"nll": "loss", "qa_frac": "questions"}
            names = ", ".join(f"{row.comparison.replace('_vs_', ' against ')} ({told[row.metric]})"
                              for row in held.itertuples())  # fmt: skip
            rows += [(family, f"{verdict}_count", len(held)), (family, f"{verdict}_names", names or "none")]
    return pd.DataFrame(rows, columns=["of", "metric", "value"])
