"""Tables of notebook 09: what sizes of rank and parts of the model reach, and the planned comparisons."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.report.cells import CLAIMS, DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

PLACEMENT_NAMES = {
    "rank-1": "Rank 1, all parts",
    "rank-4": "Rank 4, all parts",
    "rank-16": "Rank 16, all parts",
    "rank-64": "Rank 64, all parts",
    "vision": "Vision alone",
    "fusion": "Fusion alone",
    "text": "Text alone",
}
FOLDER = "09_rank_size_and_placement"


def placement_table(results: Path) -> Table:
    """NLL of every arm on every domain, its ranks, learning rates, parameters, memory and FLOPs of a step."""
    columns = ("domain", "arm", "metric", "value", "low", "high")
    frame = read_csv(results, f"{FOLDER}/summary.csv", columns)
    rates = read_csv(results, f"{FOLDER}/lr.csv", ("domain", "arm", "learning_rate"))
    rates = rates.set_index(["arm", "domain"])["learning_rate"]
    bought = _ranks(results)
    cells = frame.set_index(["arm", "metric", "domain"]).sort_index()
    domains, arms = ordered(frame["domain"], DOMAINS), ordered(frame["arm"], PLACEMENT_NAMES)
    rows: list[tuple[str, ...] | None] = []
    for arm in arms:
        if rows and not arm.startswith("rank-") and rows[-1][0].startswith("Rank"):
            rows.append(None)
        counted = (format_number(cells.loc[(arm, metric)]["value"].iloc[0], metric)
                   for metric in ("trainable_parameters", "train_bytes", "step_flops"))  # fmt: skip
        losses = (_loss(cells.loc[(arm, "nll", domain)]) for domain in domains)
        ranks = bought.get(arm, arm.removeprefix("rank-"))
        found = (format_number(rates[arm, domain], "learning_rate") for domain in domains)
        rows.append((label(arm, PLACEMENT_NAMES), *losses, ranks, " / ".join(found), *counted))
    heads = (f"NLL, {label(domain, DOMAINS).lower()}" for domain in domains)
    return Table(
        ("Adapters", *heads, "Ranks", "Learning rates", "Trainable", "Memory", "FLOPs"), tuple(rows)
    )


def _ranks(results: Path) -> dict[str, str]:
    """The ranks that an arm with a budget got: `59`, or `11-12` where they differ by one."""
    sizes = read_csv(results, f"{FOLDER}/sizes.csv", ("arm", "rank_low", "rank_high")).groupby("arm")
    ends = zip(sizes["rank_low"].min().items(), sizes["rank_high"].max(), strict=True)
    return {arm: f"{low}" if low == high else f"{low}-{high}" for (arm, low), high in ends}


def _loss(row: pd.Series) -> str:
    interval = format_interval(row["low"], row["high"], "nll")
    return rf"{format_number(row['value'], 'nll')} {{\scriptsize {interval}}}"


def placement_tests_table(results: Path) -> Table:
    """The planned comparisons: the primary ones, then further pairs."""
    numbers = ("value", "low", "high", "p_holm", "smallest_effect")
    columns = ("domain", "comparison", "claim", *numbers, "verdict", "family")
    frame, rows = read_csv(results, f"{FOLDER}/tests.csv", columns), []
    for family in ("primary", "beside"):
        for domain in ordered(frame["domain"], DOMAINS):
            found = frame[(frame["family"] == family) & (frame["domain"] == domain)].to_dict("records")
            rows += [None] * bool(rows and found)
            rows += [(label(domain, DOMAINS) if row is found[0] else "", *_test(row)) for row in found]
    heads = ("Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Domain", "Claim", *heads), tuple(rows), left=2)


def _test(row: dict) -> tuple[str, ...]:
    a, b = (label(arm, PLACEMENT_NAMES) for arm in row["comparison"].split("_vs_"))
    return (
        f"{a} {CLAIMS[row['claim']]} {b[0].lower() + b[1:]}",
        format_number(row["value"], "nll"),
        format_interval(row["low"], row["high"], "nll"),
        format_number(row["smallest_effect"], "nll"),
        format_number(row["p_holm"], "p_holm"),
        latex_text(row["verdict"]),
    )


PLACEMENT_TABLES = {"placement": placement_table, "placement_tests": placement_tests_table}
