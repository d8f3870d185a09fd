"""What notebook 11 makes of its runs: learning rates, means of every reading, planned claims.

    rates = settle_rates(general, sweep, own, committed)
    runs = run_grid(general.runs(by_domain(rates)), here.store, here.profile)
    tests = judge(general, runs)         # family, on, comparison, metric, value, .., verdict
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora import stats
from vqlora.experiments.general import ALL, JOINT, LANGUAGES, GeneralSettings
from vqlora.metrics import metric_values
from vqlora.store import StoredRun, write_csv

METRICS = ("nll", "slot_frac", "exact_frac", "qa_frac", "t2v_r1")
SCORED = ("nll", "slot", "exact", "correct", "rank")  # a run of languages alone asks no question
NAMED = ["trained", "arm", "reading"]
TOLD = {"nll": "NLL", "qa_frac": "questions", "t2v_r1": "retrieval"}
VERDICTS = ("supported", "denied", "undecided")


# -- rates


def sweep_table(sweep: Sequence[StoredRun]) -> pd.DataFrame:
    """Every try: domain, arm, learning_rate, metric, value."""
    rows = [(run.settings.domain, run.settings.method, run.settings.learning_rate, "nll", run.metrics["nll"])
            for run in sweep]  # fmt: skip
    return pd.DataFrame(rows, columns=["domain", "arm", "learning_rate", "metric", "value"])


def settle_rates(
    general: GeneralSettings, sweep: Sequence[StoredRun], own: Path, committed: Path
) -> pd.DataFrame:
    """The rate of all runs on each domain: domain, arm ("all"), bits, learning_rate, origin.

    That with the lowest mean NLL in this profile's sweep, else in the committed one, else the profile's. A
    sweep's is written to ``own``.
    """
    own.unlink(missing_ok=True)
    if sweep:
        means = sweep_table(sweep).groupby(["domain", "learning_rate"], as_index=False)["value"].mean()
        best = means.loc[means.groupby("domain")["value"].idxmin()].assign(arm="all", bits="nf4")
        write_csv(own, best[["domain", "arm", "bits", "learning_rate", "value"]])
    path = next((path for path in (own, committed) if path.is_file()), None)
    known = {} if path is None else by_domain(pd.read_csv(path))
    word = "sweep" if path == own else "committed sweep"
    rows = [(domain, "all", "nf4", known.get(domain, general.learning_rate),
             word if domain in known else "profile")
            for domain in general.domains]  # fmt: skip
    return pd.DataFrame(rows, columns=["domain", "arm", "bits", "learning_rate", "origin"])


def by_domain(rates: pd.DataFrame) -> dict[str, float]:
    """What `settle_rates` gives as a mapping from domain to learning rate."""
    return dict(zip(rates["domain"], rates["learning_rate"].astype(float), strict=True))


# -- readings


def readings(runs: Sequence[StoredRun], metric: str) -> pd.DataFrame:
    """A row for each run, reading and item that has the metric: NAMED, seed, clip, value."""
    parts = []
    for run in runs:
        rows = run.examples()
        rows = rows if "reading" in rows else rows.assign(reading="own")
        rows = rows.reindex(columns=list(dict.fromkeys([*rows, *SCORED])))
        named = {"trained": run.settings.domain, "arm": run.settings.method, "seed": run.settings.seed}
        for reading, own in rows.groupby("reading", sort=False):
            values = metric_values(own, metric)
            if len(values):
                parts.append(values.assign(reading=reading, **named))
    return pd.concat(parts, ignore_index=True)[[*NAMED, "seed", "clip", "value"]]


def summarise(
    runs: Sequence[StoredRun], metrics: Sequence[str] = METRICS, seed: int = 0
) -> pd.DataFrame:
    """Every reading of every arm: NAMED, metric, value, low, high (95%, over seeds and clips)."""
    rng, tables = np.random.default_rng(seed), []
    for metric in metrics:
        table = stats.summarise(readings(runs, metric), rng, by=NAMED).rename(columns={"mean": "value"})
        if metric != "nll":                                  # a share: no interval leaves what is possible
            table[["low", "high"]] = table[["low", "high"]].clip(0, 1)
        tables.append(table.assign(metric=metric)[[*NAMED, "metric", "value", "low", "high"]])
    return pd.concat(tables, ignore_index=True)


# -- claims


def claims(general: GeneralSettings) -> list[dict]:
    """All comparisons, written down before any run, in four families; `a` and `b` are NAMED.

    domains: what was tuned on one domain is no worse than the frozen base on another. languages: adapters
    tuned in English gain in another language; all languages in one run are no worse than one alone. tasks:
    one run of all is no worse than a run of each, and finds clips better than without the contrastive loss.
    frames: more frames than in training are no worse than as many.
    """
    focus, made = general.focus, []

    def plan(family: str, on: str, comparison: str, claim: str, a, b, metric: str = "nll") -> None:
        margin = general.margin_nll if metric == "nll" else general.margin_frac
        margin = margin if claim == "no_worse" else 0.0
        made.append({"family": family, "on": on, "comparison": comparison, "metric": metric, "claim": claim,
                     "margin": margin, "a": a, "b": b})  # fmt: skip

    for trained in general.domains:
        for domain in (*general.domains, *general.also):
            if domain != trained:
                sides = ((trained, arm, f"domain.{domain}") for arm in (JOINT, "frozen"))
                plan("domains", f"{trained} to {domain}", "tuned_vs_frozen", "no_worse", *sides)
    for name in general.languages:
        sides = ((focus, arm, f"language.{name}") for arm in (JOINT, "frozen"))
        plan("languages", name, "en_vs_frozen", "greater", *sides)
    for name, alone in (("en", JOINT), *((name, name) for name in general.languages)):
        sides = ((focus, arm, f"language.{name}") for arm in (ALL, alone))
        plan("languages", name, "together_vs_alone", "no_worse", *sides)
    own = {task: (focus, task, "own") for task in (JOINT, *general.tasks)}
    for task, metric, claim in (("captions", "nll", "no_worse"), ("questions", "qa_frac", "no_worse"),
                                ("no-contrast", "nll", "no_worse"), ("no-contrast", "t2v_r1", "greater")):
        if task in own:
            plan("tasks", focus, f"joint_vs_{task}", claim, own[JOINT], own[task], metric)
    for domain in general.domains:
        for count in general.frames:
            if count > 8:
                sides = ((domain, JOINT, reading) for reading in (f"frames.{count}", "own"))
                plan("frames", domain, f"{count}_vs_8", "no_worse", *sides)
    return made


def judge(general: GeneralSettings, runs: Sequence[StoredRun], seed: int = 0) -> pd.DataFrame:
    """The claims tested: family, on, comparison, metric, value, low, high, claim, margin, p, p_holm,
    smallest_effect, verdict. A gain is positive where the first side is better; Holm is within a family.
    """
    rng, rows = np.random.default_rng(seed), []
    planned = claims(general)
    known = {metric: readings(runs, metric) for metric in {claim["metric"] for claim in planned}}
    for claim in planned:
        sides = []
        for side in "ab":
            rows_of = known[claim["metric"]]
            for column, wanted in zip(NAMED, claim[side], strict=True):
                rows_of = rows_of[rows_of[column] == wanted]
            sides.append(rows_of.assign(arm=side))
        asked = {"a": "a", "b": "b", "claim": claim["claim"], "margin": claim["margin"]}
        better = "lower" if claim["metric"] == "nll" else "higher"
        found = stats.compare(pd.concat(sides), [asked], rng, better=better).iloc[0]
        named = {key: claim[key] for key in ("family", "on", "comparison", "metric")}
        rows.append({**named, "value": found["difference"], **found[
            ["low", "high", "claim", "margin", "p", "smallest_effect"]].to_dict()})  # fmt: skip
    table = stats.corrected(pd.DataFrame(rows), "family")
    table["margin"] = table["margin"].where(table["margin"] > 0)
    return table[["family", "on", "comparison", "metric", "value", "low", "high", "claim", "margin", "p",
                  "p_holm", "smallest_effect", "verdict"]]  # fmt: skip


def overall(tests: pd.DataFrame) -> pd.DataFrame:
    """How the verdicts fell, by family and by comparison of a family (of, metric, value): how many claims,
    how many of each verdict and which, largest and smallest gain in NLL.
    """
    tests, rows = tests.assign(name=[_named(row) for row in tests.to_dict("records")]), []
    groups = list(tests.groupby("family", sort=False))
    groups += [(".".join(key), own) for key, own in tests.groupby(["family", "comparison"], sort=False)]
    for name, own in groups:
        rows.append((name, "claims_count", str(len(own))))
        for verdict in VERDICTS:
            held = own.loc[own["verdict"] == verdict, "name"]
            rows.append((name, f"{verdict}_count", str(len(held))))
            rows.append((name, f"{verdict}_names", ", ".join(held) or "none"))
        losses = own[own["metric"] == "nll"]
        for which in ("largest", "smallest") if len(losses) else ():
            row = losses.sort_values("value").iloc[-1 if which == "largest" else 0]
            rows += [(name, f"{which}_nll", f"{row['value']:.8g}"), (name, f"{which}_name", row["name"])]
    return pd.DataFrame(rows, columns=["of", "metric", "value"])


def _named(row: dict) -> str:
    """What a claim is about, in a few words for a list of claims of one family."""
    first, second = row["comparison"].split("_vs_")
    if row["family"] == "frames":
        return f"{first} frames ({row['on']})"
    if row["family"] == "tasks":
        return f"{first} against {second} ({TOLD.get(row['metric'], row['metric'])})"
    return LANGUAGES.get(row["on"], row["on"])
