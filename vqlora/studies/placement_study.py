"""What notebook 09 asks of its runs: how large ranks must be, and which part of the model needs them.

    claims = planned("language", margin_nll=0.05, arms=names)   # family, then the claims about pairs of arms
    tests = judge(runs, margin_nll=0.05)                        # domain, comparison, .., verdict, family
    sizes(runs)                                                 # arm, modality: layers, ranks, parameters
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from vqlora import comparison, stats
from vqlora.store import StoredRun
from vqlora.studies.rank_study import ranks_of

ALL = "rank-4"  # ranks of 4 on all layers: what the budget of a single part buys there
PARTS = ("vision", "fusion", "text")
CALLED_FOR = {"language": "text", "visual": "vision"}  # the part that a domain's shift is thought to need


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
