"""Tables of notebook 11: what generalizes, by planned comparison; languages; one run of all tasks or more."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.experiments.general import LANGUAGES
from vqlora.report.cells import DOMAINS, METRICS, Table, label, ordered, read_csv, verdict_cells
from vqlora.report.keys import format_interval, format_number, latex_text

FILE = "11_generalization/summary.csv"
COLUMNS = ("trained", "arm", "reading", "metric", "value", "low", "high")
TRAINED = {"frozen": "frozen", "language": "tuned on language", "visual": "tuned on visual"}
TASKS = {
    "frozen": "None (frozen)",
    "joint": "All in one run",
    "captions": "Captions alone",
    "questions": "Questions alone",
    "no-contrast": "Captions and questions",
}
FAMILIES = {"domains": "Domains", "languages": "Languages", "tasks": "Tasks", "frames": "Frames"}
CLAIMS = {
    "tuned_vs_frozen": "Tuned no worse than frozen",
    "en_vs_frozen": "Tuned in English beats frozen",
    "together_vs_alone": "All languages in one run no worse than one",
    "joint_vs_captions": "One run of all no worse than captions alone",
    "joint_vs_questions": "One run of all no worse than questions alone",
    "joint_vs_no-contrast": "With contrastive loss {} without",
    "16_vs_8": "16 frames no worse than 8",
    "32_vs_8": "32 frames no worse than 8",
}
SHOWN = ("nll", "slot_frac", "qa_frac", "t2v_r1")


def general_tests_table(results: Path) -> Table:
    """All planned comparisons, a family below the other."""
    columns = ("family", "on", "comparison", "metric", "value", "low", "high", "claim", "p_holm", "verdict")
    frame = read_csv(results, "11_generalization/tests.csv", (*columns, "smallest_effect"))
    rows: list[tuple[str, ...] | None] = []
    for family in ordered(frame["family"], FAMILIES):
        own = frame[frame["family"] == family].to_dict("records")
        rows += [None] * bool(rows)
        rows += [(FAMILIES.get(family, family) if row is own[0] else "", *_test(row)) for row in own]
    heads = ("On", "Claim", "Metric", "Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("", *heads), tuple(rows), left=4)


def _test(row: dict) -> tuple[str, ...]:
    metric, on = row["metric"], row["on"]
    claim = CLAIMS.get(row["comparison"], row["comparison"].replace("_", " "))
    claim = claim.format("no worse than" if row["claim"] == "no_worse" else "beats")
    return (
        LANGUAGES.get(on) or (label(on, DOMAINS) if on in DOMAINS else latex_text(on.capitalize())),
        claim,
        METRICS.get(metric, metric),
        *verdict_cells(row, metric),
    )


def general_languages_table(results: Path) -> Table:
    """NLL and slot accuracy of captions in each language, by what was learned."""
    frame = read_csv(results, FILE, COLUMNS)
    frame = frame[frame["reading"].str.startswith("language.")]
    cells = frame.assign(language=frame["reading"].str.removeprefix("language."))
    cells = cells.drop_duplicates(["arm", "language", "metric"]).set_index(["arm", "language", "metric"])
    rows = []
    for language in ordered(cells.index.unique("language"), LANGUAGES):
        arms = ("frozen", "joint", "joint" if language == "en" else language, "together")
        found = [_pair(cells, arm, language) for arm in arms]
        found[2] = "--" if language == "en" else found[2]
        rows.append((label(language, LANGUAGES), *found))
    return Table(("Captions in", "Frozen", "Tuned in English", "In it alone", "In all"), tuple(rows))


def _pair(cells: pd.DataFrame, arm: str, language: str) -> str:
    found = (cells["value"].get((arm, language, metric)) for metric in ("nll", "slot_frac"))
    texts = ("--" if value is None else format_number(value, metric, unit=False)
             for value, metric in zip(found, ("nll", "slot_frac"), strict=True))  # fmt: skip
    return " / ".join(texts)


def general_tasks_table(results: Path) -> Table:
    """What one run of each task, and one of all, reaches in every task."""
    frame = read_csv(results, FILE, COLUMNS)
    frame = frame[(frame["reading"] == "own") & frame["arm"].isin(TASKS)]
    focus = frame.groupby("trained")["arm"].nunique().idxmax()
    cells = frame[frame["trained"] == focus].set_index(["arm", "metric"])
    rows = []
    for arm in ordered(cells.index.unique("arm"), TASKS):
        found = (_interval(cells.loc[(arm, metric)], metric) for metric in SHOWN)
        rows.append((label(arm, TASKS), *found))
    return Table(("Learned", *(METRICS[metric] for metric in SHOWN)), tuple(rows))


def _interval(row: pd.Series, metric: str) -> str:
    interval = format_interval(row["low"], row["high"], metric)
    return rf"{format_number(row['value'], metric)} {{\scriptsize {interval}}}"


GENERAL_TABLES = {
    "general_languages": general_languages_table,
    "general_tasks": general_tasks_table,
    "general_tests": general_tests_table,
}
