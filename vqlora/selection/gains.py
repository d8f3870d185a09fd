"""From judged runs to tables: what each policy is worth against even frames and against the oracle.

    examples = judged_examples(runs)
    table = policy_table(examples)      # domain, frames, policy, clips, nll, slot, exact, seen, gain, gain_se
    validation = policy_table(examples, "val")
    best = best_policy(validation)      # one for all, for the test part
    table = with_chosen(table, validation)      # and, as "chosen", one for each domain and number of frames
    closed = closed_gap(table)          # share of the gap between even frames and oracle that a policy closes

Gain is in nats per token of the references' likelihood, positive where a policy beats even frames; its
standard error is over clips (means over seeds first), paired: the same model read the same clips.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vqlora.store import StoredRun

VALUES = ("nll", "slot", "exact", "seen")
ORACLE, CHOSEN = "oracle", "chosen"


def judged_examples(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """All examples of judged runs with columns domain and seed added; the oracle is one more policy.

    The oracle of a domain and number of frames is the design with the lowest validation NLL, mean over seeds.
    """
    parts = [run.examples().assign(domain=run.settings.domain, seed=run.settings.seed) for run in runs]
    table = pd.concat(parts, ignore_index=True)
    designs = table[table["policy"].str.startswith("oracle-")]
    means = designs[designs["part"] == "val"].groupby(["domain", "frames", "policy"])["nll"].mean()
    chosen = means.groupby(["domain", "frames"]).idxmin()
    best = pd.DataFrame(list(chosen), columns=["domain", "frames", "policy"])
    oracle = designs.merge(best, on=list(best.columns)).assign(policy=ORACLE)
    return pd.concat([table, oracle], ignore_index=True)


def policy_table(examples: pd.DataFrame, part: str = "test") -> pd.DataFrame:
    """Means of `VALUES` and the paired gain in NLL over even frames, by domain, frames and policy."""
    rows, own = [], examples[examples["part"] == part]
    for (domain, frames), cell in own.groupby(["domain", "frames"], sort=False):
        nll = cell.pivot_table(index="clip", columns="policy", values="nll", aggfunc="mean")
        means = cell.groupby("policy", sort=False)[list(VALUES)].mean()
        for policy, values in means.iterrows():
            gain = nll["uniform"] - nll[policy]
            error = float(gain.std(ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else math.nan
            rows.append((domain, frames, policy, len(gain), *values, float(gain.mean()), error))
    return pd.DataFrame(rows, columns=["domain", "frames", "policy", "clips", *VALUES, "gain", "gain_se"])


def best_policy(validation: pd.DataFrame) -> str:
    """The policy with the largest mean gain over domains and numbers of frames of a `policy_table`."""
    own = validation[~validation["policy"].str.startswith(ORACLE)]
    return str(own.groupby("policy")["gain"].mean().idxmax())


def choices(validation: pd.DataFrame) -> pd.DataFrame:
    """The policy with the lowest mean NLL in a `policy_table` of validation clips, by domain and number of
    frames (columns domain, frames, policy), as the oracle's design is chosen. Of several that chose the same
    frames it is the last by name: even frames before segments, these before own segments."""
    own = validation[~validation["policy"].str.startswith(ORACLE)]
    own = own.sort_values("policy", ascending=False, ignore_index=True)
    best = own.groupby(["domain", "frames"])["nll"].idxmin()
    return own.loc[best, ["domain", "frames", "policy"]].reset_index(drop=True)


def with_chosen(table: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """`table` with one more policy, `CHOSEN`: the rows of what validation chooses (`choices`), which may be
    even frames."""
    return pd.concat([table, table.merge(choices(validation)).assign(policy=CHOSEN)], ignore_index=True)


def closed_gap(table: pd.DataFrame) -> pd.DataFrame:
    """Where the oracle beats even frames by more than two standard errors: what share of it a policy gains.

    Returns domain, frames, policy, gain, gap (of the oracle), closed (gain / gap), worse (gain under -2
    standard errors). `closed` is NaN where there is no such gap: even frames are enough there.
    """
    oracle = table[table["policy"] == ORACLE].set_index(["domain", "frames"])[["gain", "gain_se"]]
    own = table[~table["policy"].str.startswith(ORACLE)]
    gap = oracle.loc[list(zip(own["domain"], own["frames"], strict=True))]
    there = gap["gain"].to_numpy() > 2 * gap["gain_se"].to_numpy()
    closed = np.where(there, own["gain"].to_numpy() / gap["gain"].to_numpy(), math.nan)
    return own[["domain", "frames", "policy", "gain", "gain_se"]].assign(
        gap=gap["gain"].to_numpy(), closed=closed, worse=own["gain"] < -2 * own["gain_se"]
    ).reset_index(drop=True)


def per_policy_table(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Models trained and tested on one policy's frames, by domain, number of frames and policy.

    `gain` is in NLL over the model of even frames, paired by seed and clip; `gain_se` is over clips.
    """
    parts = []
    for run in runs:
        own = run.examples()
        own = own[own["task"] == "caption"][["clip", "nll", "slot"]]
        named = {name: getattr(run.settings, name) for name in ("domain", "frames", "seed")}
        named |= {"policy": run.settings.select, "part": "test", "exact": math.nan, "seen": math.nan}
        parts.append(own.assign(**named))
    if not parts:
        return pd.DataFrame(columns=["domain", "frames", "policy", "seeds", "nll", "slot", "gain", "gain_se"])
    examples = pd.concat(parts, ignore_index=True)
    seeds = examples["seed"].nunique()
    return policy_table(examples).assign(seeds=seeds)[
        ["domain", "frames", "policy", "seeds", "nll", "slot", "gain", "gain_se"]]


def verdicts(closed: pd.DataFrame, policies: Sequence[str]) -> pd.DataFrame:
    """What the planned question comes to, a row a policy, over the cells (domain, number of frames).

    cells; gap_cells (with a gap to the oracle); closed_frac (all gains there over all gaps); capped_frac (the
    same with no gain counted beyond its gap: an oracle of events can be beaten); half_cells (at least half of
    the gap gained); worse_cells (worse than even frames) and `worse`, their names.
    """
    rows = []
    for policy in policies:
        own = closed[closed["policy"] == policy]
        there = own[own["closed"].notna()]
        worse = own[own["worse"]]
        names = ", ".join(worse["domain"] + " " + worse["frames"].astype(str))
        counted = (there["gain"], there["gain"].clip(upper=there["gap"]))
        shares = [part.sum() / there["gap"].sum() if len(there) else math.nan for part in counted]
        half = int((there["closed"] >= 0.5).sum())
        rows.append((policy, len(own), len(there), *shares, half, len(worse), names))
    columns = ["policy", "cells", "gap_cells", "closed_frac", "capped_frac", "half_cells", "worse_cells",
               "worse"]
    return pd.DataFrame(rows, columns=columns)


def summary(table: pd.DataFrame, closed: pd.DataFrame, best: str) -> pd.DataFrame:
    """Keyed numbers: domain, policy, frames, metric, value. The best policy also goes by the name `best`.

    `overall` counts every domain, `targets` all but the source and what other cameras make of it, whose clips
    show the same scenes again.
    """
    shown = pd.concat([table, table[table["policy"] == best].assign(policy="best")])
    shown = shown.rename(columns={name: f"{name}_frac" for name in VALUES[1:]})
    long = shown.melt(["domain", "policy", "frames"], ["nll", "slot_frac", "seen_frac", "gain"], "metric")
    targets = closed[~closed["domain"].str.startswith("source")]
    counted = [_counted(cells, best, name)[long.columns] for name, cells in
               (("overall", closed), ("targets", targets)) if len(cells)]
    named = pd.DataFrame([("overall", "best", "", "name", best)], columns=long.columns)
    return pd.concat([long, *counted, named], ignore_index=True)


def _counted(closed: pd.DataFrame, best: str, name: str) -> pd.DataFrame:
    """`verdicts` of all policies as keyed rows under the name of a group of domains."""
    table = verdicts(closed, list(dict.fromkeys(closed["policy"]))).drop(columns="worse")
    table = pd.concat([table, table[table["policy"] == best].assign(policy="best")])
    table = table.melt(["policy"], var_name="metric").assign(domain=name, frames="")
    table["value"] = table["value"].astype(object).where(table["value"].notna(), "n/a")
    return table
