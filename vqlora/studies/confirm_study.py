"""What notebook 15 asks of its runs: the verdicts on the primary claims, corrected over all of them together.

    runs = [run_grid(part.runs(base=here.base), here.store, here.profile) for part in parts]
    tests = judge(parts, runs)                    # part, domain, comparison, .., p_holm, verdict, family
    summary = summarise(parts, runs)              # part, domain, arm, metric, value, low, high
    counts = overall(tests)                       # of, metric, value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from vqlora import comparison, stats
from vqlora.experiments import ConfirmPart
from vqlora.store import StoredRun

METRICS = ("nll", "slot_frac", "qa_frac")


def judge(
    parts: Sequence[ConfirmPart], runs: Sequence[Sequence[StoredRun]], *, values: Callable | None = None
) -> pd.DataFrame:
    """Tests of every part's claims on its domains, as `comparison.judge` makes them: a row each.

    Holm's correction is within a family ("primary", "beside") over all parts. Denied is also a gain whose
    interval lies below the part's margin. runs: those of each part.
    """
    found = []
    for part, own in zip(parts, runs, strict=True):
        for family in dict.fromkeys(claim.family for claim in part.claims):
            claims = [{"a": claim.a, "b": claim.b, "claim": claim.claim, "margin": part.margin_nll}
                      for claim in part.claims if claim.family == family]  # fmt: skip
            tests = comparison.judge(own, claims, values=values)
            found.append(tests.assign(part=part.name, family=family))
    table = stats.corrected(pd.concat(found, ignore_index=True), "family")
    return table[["part", *(name for name in table.columns if name != "part")]]


def summarise(parts: Sequence[ConfirmPart], runs: Sequence[Sequence[StoredRun]]) -> pd.DataFrame:
    """Means of each part's arms with intervals: part, domain, arm, metric, value, low, high."""
    found = [comparison.summarise(own, metrics=METRICS).assign(part=part.name)
             for part, own in zip(parts, runs, strict=True)]  # fmt: skip
    table = pd.concat(found, ignore_index=True)
    return table[["part", *(name for name in table.columns if name != "part")]]


def overall(tests: pd.DataFrame) -> pd.DataFrame:
    """Verdicts by family (of, metric, value): how many claims, how many and which of each verdict."""
    rows = []
    for family, own in tests.groupby("family", sort=False):
        rows.append((family, "claims_count", len(own)))
        for verdict in ("supported", "denied", "undecided"):
            held = own[own["verdict"] == verdict]
            names = ", ".join(f"{row.part} on {row.domain}" for row in held.itertuples())
            rows += [(family, f"{verdict}_count", len(held)), (family, f"{verdict}_names", names or "none")]
    return pd.DataFrame(rows, columns=["of", "metric", "value"])
