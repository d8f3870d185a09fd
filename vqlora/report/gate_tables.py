"""Tables of notebook 05: what a temporal gate is worth against its controls and against choosing frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vqlora.report.cells import DOMAINS, NOT_RUN, Table, label, ordered, rate_cell, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

GATE_NAMES = {
    "plain": "plain adapters",
    "rank": "gate",
    "constant": "constant gate",
    "shuffled": "shuffled features",
    "random": "random features",
    "rank-vision": "gate on vision",
    "rank-text": "gate on text",
    "mixture": "two experts",
    "mixture-constant": "two experts, constant",
    "mixture-shuffled": "two experts, shuffled",
    "segments": "segments, plain",
    "rank+segments": "segments, gate",
}
FILE = "05_temporal/tests.csv"


def gate_tests_table(results: Path) -> Table:
    """The primary comparisons, then the gate against plain adapters on the further domains."""
    return _tests(results, ("primary", "domains"))


def gate_beyond_table(results: Path) -> Table:
    """The gate against its controls on the further domains."""
    return _tests(results, ("beyond",))


def gate_arms_table(results: Path) -> Table:
    """Further pairs of arms on the main domains: controls, kinds of gate, chosen frames."""
    return _tests(results, ("arms",))


def _tests(results: Path, families: Sequence[str]) -> Table:
    columns = ("domain", "comparison", "value", "low", "high", "p_holm", "smallest_effect", "verdict")
    frame, rows = read_csv(results, FILE, (*columns, "family")), []
    for family in families:
        own = frame[frame["family"] == family]
        for domain in ordered(own["domain"], DOMAINS):
            found = own[own["domain"] == domain].to_dict("records")
            if rows and (len(found) > 1 or domain == ordered(own["domain"], DOMAINS)[0]):
                rows.append(None)
            rows += [(label(domain, DOMAINS) if row is found[0] else "", *_test(row)) for row in found]
    heads = ("Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Domain", "Claim", *heads), tuple(rows), left=2)


def _test(row: dict) -> tuple[str, ...]:
    a, b = row["comparison"].split("_vs_")
    claim = f"{label(a, GATE_NAMES)} beats {label(b, GATE_NAMES)}"
    return (
        claim[0].upper() + claim[1:],
        format_number(row["value"], "nll"),
        format_interval(row["low"], row["high"], "nll"),
        format_number(row["smallest_effect"], "nll"),
        format_number(row["p_holm"], "p_holm"),
        latex_text(row["verdict"]),
    )


def gate_nll_table(results: Path) -> Table:
    """Mean NLL of every arm on every domain, and what each arm trains."""
    frame = read_csv(results, "05_temporal/summary.csv", ("domain", "arm", "metric", "value"))
    arms = ordered(frame["arm"], GATE_NAMES)
    nll = frame[frame["metric"] == "nll"].set_index(["domain", "arm"])["value"]
    rows = [
        (label(domain, DOMAINS), *(_cell(nll, domain, arm) for arm in arms))
        for domain in ordered(frame["domain"], DOMAINS)
    ]
    trained = frame[frame["metric"] == "trainable_parameters"].groupby("arm")["value"].first()
    counts = (format_number(trained[arm], "parameters") for arm in arms)
    heads = (label(arm, GATE_NAMES) for arm in arms)
    rows += [None, ("Parameters", *counts)]
    return Table(("Domain", *(head[0].upper() + head[1:] for head in heads)), tuple(rows))


def _cell(nll: pd.Series, domain: str, arm: str) -> str:
    return format_number(float(nll[domain, arm]), "nll") if (domain, arm) in nll.index else "--"


def gate_sweep_table(results: Path) -> Table:
    """Validation NLL of every pair of rates that was swept; the chosen pair of each arm is bold."""
    if not Path(results, "05_temporal/sweep.csv").is_file():
        return Table(("Arm",), ((NOT_RUN,),))
    columns = ("domain", "arm", "learning_rate", "gate_rate", "metric", "value", "chosen")
    frame = read_csv(results, "05_temporal/sweep.csv", columns)
    frame = frame[frame["metric"] == "nll"]
    times, rows = sorted(frame["gate_rate"].dropna().unique()), []
    for domain in ordered(frame["domain"], DOMAINS):
        named = label(domain, DOMAINS)
        for arm in ordered(frame.loc[frame["domain"] == domain, "arm"], GATE_NAMES):
            own = frame[(frame["domain"] == domain) & (frame["arm"] == arm)]
            rows += [None] if rows else []
            name = label(arm, GATE_NAMES)
            name = name[0].upper() + name[1:]
            for rate, tried in own.groupby("learning_rate"):
                gated = (rate_cell(tried[tried["gate_rate"] == many]) for many in times)
                cells = (rate_cell(tried[tried["gate_rate"].isna()]), *gated)
                rows.append((named, name, format_number(rate, "learning_rate"), *cells))
                named = name = ""
    heads = ("No gate", *(f"{t:g} times" for t in times))
    return Table(("Domain", "Arm", "Rate", *heads), tuple(rows), left=2)


GATE_TABLES = {
    "gate_arms": gate_arms_table,
    "gate_beyond": gate_beyond_table,
    "gate_nll": gate_nll_table,
    "gate_sweep": gate_sweep_table,
    "gate_tests": gate_tests_table,
}
