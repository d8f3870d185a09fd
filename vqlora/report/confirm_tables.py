"""Table of notebook 15: the primary claims on new seeds and clips, beside what was found before."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.report.cells import CLAIMS, DOMAINS, Table, label, read_csv, verdict_cells
from vqlora.report.gate_tables import GATE_NAMES
from vqlora.report.keys import format_number

FILE = "15_confirmation/tests.csv"
BEFORE = {"bits": "03_main", "gate": "05_temporal", "ranks": "06_ranks", "textsplit": "06_ranks",
          "visionsplit": "06_ranks"}  # where a part's claims come from  # fmt: skip
RANKS = {"relative": "relative allocation", "uniform": "equal ranks", "text-heavy": "text-heavy ranks",
         "vision-heavy": "vision-heavy ranks"}  # fmt: skip
NAMES = {**GATE_NAMES, **RANKS, "qlora": "QLoRA", "lora": "LoRA"}


def confirmation_table(results: Path) -> Table:
    """Each claim on each domain: gain at three seeds, gain at ten new ones, and the verdict on these."""
    if not Path(results, FILE).is_file():
        return Table(("Claim",), (("not run with this profile",),))
    columns = ("value", "low", "high", "claim", "smallest_effect", "p_holm", "verdict", "family")
    frame, rows = read_csv(results, FILE, ("part", "domain", "comparison", *columns)), []
    for family in dict.fromkeys(frame["family"]):
        rows += [None] * bool(rows)
        rows += [_row(row, results) for row in frame[frame["family"] == family].to_dict("records")]
    heads = ("Before", "New seeds", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Claim", "Domain", *heads), tuple(rows), left=2)


def _row(row: dict, results: Path) -> tuple[str, ...]:
    a, b = (label(arm, NAMES) for arm in row["comparison"].split("_vs_"))
    claim = f"{a} {CLAIMS[row['claim']]} {b}"
    return (
        claim[0].upper() + claim[1:],
        label(row["domain"], DOMAINS),
        _before(row, results),
        *verdict_cells(row, "nll"),
    )


def _before(row: dict, results: Path) -> str:
    path = Path(results, BEFORE.get(row["part"], ""), "tests.csv")
    if not path.is_file():
        return "--"
    frame = pd.read_csv(path)
    same = frame[(frame["domain"] == row["domain"]) & (frame["comparison"] == row["comparison"])]
    return format_number(same.iloc[0]["value"], "nll") if len(same) else "--"


CONFIRM_TABLES = {"confirmation": confirmation_table}
