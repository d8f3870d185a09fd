"""Tables of README.md, between `<!-- table: name -->` and `<!-- end -->`, from results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vqlora.console import duration
from vqlora.experiments import load_profile
from vqlora.files import write_atomic
from vqlora.report.cells import Table, read_csv
from vqlora.report.claims import Claim, judge_claims, load_claims
from vqlora.report.keys import format_number, gpu_status
from vqlora.report.tables import TABLES

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def kills_table(results: Path) -> Table:
    """What became of commands that were killed, by the phase they were in (`tests/kill.py`)."""
    outcomes = ("same", "different", "failed")
    frame = read_csv(results, "faults/kills.csv", ("hit", "signal", "whom", *outcomes))
    frame["kills"] = frame[list(outcomes)].sum(axis=1)
    rows = [
        (phase.capitalize(), *(format_number(n, "files") for n in (
            of["kills"].sum(), of.loc[of["signal"] == "SIGTERM", "kills"].sum(),
            of.loc[of["whom"] == "first process", "kills"].sum(), *of[list(outcomes)].sum())))
        for phase, of in frame.groupby("hit", sort=True)
    ]  # fmt: skip
    heads = ("Killed while", "Kills", "by SIGTERM", "first process alone", "Same", "Different", "Failed")
    return Table(heads, tuple(rows))


def gpu_table(results: Path) -> Table:
    """What `make gpu-check` came to; one cell as long as nobody has run it."""
    path = Path(results, "gpu_check.csv")
    if not path.is_file():
        return Table(("GPU check",), ((gpu_status(path),),))
    rows = read_csv(results, "gpu_check.csv", ("name", "value", "unit", "status")).itertuples(index=False)
    return Table(("Check", "Value", "Unit", "Status"), tuple(
        (row.name.replace("_", " "), f"{row.value:.4g}", row.unit, row.status) for row in rows))  # fmt: skip


def claims_map(results: Path) -> Table:
    """Every claim of `paper/claims.yaml`: what was found, verdict, notebook, the time that takes, key.

    The time is what the profile states that the results are of, or `full` where there are none.
    """
    results = Path(results)
    root, rows = results.parent, []
    for judged in judge_claims(load_claims(root / "paper" / "claims.yaml"), results):
        claim = judged.claim
        key = rf"`{claim.key}`" + (rf" against `{claim.against}`" if claim.against else "")
        rows.append((claim.claim, judged.found, judged.verdict, claim.notebook, _cost(claim, results),
                     key.replace("_", r"\_")))  # fmt: skip
    return Table(("Claim", "Found", "Verdict", "Notebook", "Takes", "Key"), tuple(rows), left=6)


def _cost(claim: Claim, results: Path) -> str:
    """Stated time of a claim's notebook, with the profile's name where that is not the default."""
    manifest = results / claim.notebook / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8"))["profile"] if manifest.is_file() else "full"
    name = claim.profile or made
    seconds = load_profile(name, results.parent).expected_s.get(claim.notebook)
    if seconds is None:
        return "--"
    return duration(seconds) + ("" if name == "cpu" else f", `{name}`")


README_TABLES = {**TABLES, "claims": claims_map, "gpu": gpu_table, "kills": kills_table}


def fill(text: str, results: Path) -> str:
    """`text` with every marked table made anew. Raises KeyError for an unknown name, ResultsError for a
    missing file."""

    def table(found: re.Match) -> str:
        return found[1] + README_TABLES[found[2]](Path(results)).markdown() + found[3]

    return _BLOCK.sub(table, text)


def renew(root: Path) -> bool:
    """Renew the README of a checkout from its committed results; whether anything changed."""
    path = Path(root, "README.md")
    old = path.read_text(encoding="utf-8")
    new = fill(old, Path(root, "results"))
    if new != old:
        write_atomic(path, new)
    return new != old
