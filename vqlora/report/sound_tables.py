"""Tables of notebook 16: what a sound stream beside few frames is worth, by claim and by kind of question."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.report.cells import CLAIMS, DOMAINS, METRICS, Table, label, ordered, read_csv, verdict_cells
from vqlora.report.keys import format_interval, format_number

FOLDER = "16_sound"
ARMS = {
    "silent": "2 frames",
    "shuffled": "2 frames, another clip's sound",
    "fixed": "2 frames, sound, no adapter on it",
    "sound": "2 frames, sound",
    "gated": "2 frames, sound, gated",
    "silent-8": "8 frames",
}
SHORT = {
    "silent": "frames alone",
    "shuffled": "another clip's sound",
    "fixed": "sound without adapters of its own",
    "sound": "sound",
    "gated": "gated sound",
    "silent-8": "8 frames",
}
FAMILIES = {"sound": "Sound", "beside": "Beside"}
GROUPS = {"qa_heard_frac": "Heard", "qa_both_frac": "Both", "qa_seen_frac": "Seen"}
MISSING = Table(("Claim",), (("not run with this profile",),))


def sound_tests_table(results: Path) -> Table:
    """All planned comparisons, a family below the other."""
    if not Path(results, FOLDER, "tests.csv").is_file():
        return MISSING
    columns = ("domain", "comparison", "metric", "value", "low", "high", "claim", "p_holm", "verdict")
    frame = read_csv(results, f"{FOLDER}/tests.csv", (*columns, "smallest_effect", "family"))
    rows: list[tuple[str, ...] | None] = []
    for family in ordered(frame["family"], FAMILIES):
        rows += [None] * bool(rows)
        rows += [_test(row) for row in frame[frame["family"] == family].to_dict("records")]
    heads = ("Domain", "Metric", "Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Claim", *heads), tuple(rows), left=3)


def _test(row: dict) -> tuple[str, ...]:
    a, b = (label(arm, SHORT) for arm in row["comparison"].split("_vs_"))
    metric, claim = row["metric"], f"{a} {label(row['claim'], CLAIMS)} {b}"
    return (
        claim[0].upper() + claim[1:],
        label(row["domain"], DOMAINS),
        METRICS.get(metric, metric),
        *verdict_cells(row, metric),
    )


def sound_arms_table(results: Path) -> Table:
    """Every arm: loss, slots, right answers in all and by what their answer is in."""
    if not Path(results, FOLDER, "summary.csv").is_file():
        return MISSING
    columns = ("domain", "arm", "metric", "value", "low", "high")
    means = read_csv(results, f"{FOLDER}/summary.csv", columns)
    frame = pd.concat([means, read_csv(results, f"{FOLDER}/kinds.csv", columns)], ignore_index=True)
    shown = ("nll", "slot_frac", "qa_frac", *(name for name in GROUPS if (frame["metric"] == name).any()))
    rows: list[tuple[str, ...] | None] = []
    for domain in ordered(frame["domain"], DOMAINS):
        own = frame[frame["domain"] == domain].set_index(["arm", "metric"])
        rows += [None] * bool(rows)
        for arm in ordered(own.index.unique("arm"), ARMS):
            rows.append((label(arm, ARMS), *(_cell(own.loc[(arm, name)], name) for name in shown)))
    return Table(("Shown and heard", *({**METRICS, **GROUPS}[name] for name in shown)), tuple(rows))


def _cell(row: pd.Series, metric: str) -> str:
    interval = format_interval(row["low"], row["high"], metric)
    return rf"{format_number(row['value'], metric)} {{\scriptsize {interval}}}"


SOUND_TABLES = {"sound_arms": sound_arms_table, "sound_tests": sound_tests_table}
