"""``vqlora verify``: is what the paper says what the results say, and do the results stand up?

    outcome = verify("cpu", root)           # build/cpu/results against results/, then the reference itself
    show(outcome); outcome.ok

Four questions, each answered line by line: are regenerated results those of the reference within the stated
tolerances; are the committed files, and the numbers in the prose, those that were accepted; do numbers that
follow from finer ones come out again; and does any sentence claim what the numbers deny.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

from vqlora.identity import folder_hash
from vqlora.report.cells import plain
from vqlora.report.claims import Judged, judge_claims, load_claims, text_faults
from vqlora.report.kept import Kept
from vqlora.report.keys import ResultsError
from vqlora.report.paper import REFERENCE, results_dir
from vqlora.report.recompute import CHECKS
from vqlora.report.seal import seal_faults, sums
from vqlora.report.tolerances import Tolerances, compare_folders, load_tolerances

OK, FAILED, SKIPPED = "ok", "failed", "not checked"


@dataclass(frozen=True)
class Line:
    """One thing that was checked: what, how it came out, and why."""

    part: str
    what: str
    status: str
    why: str = ""


@dataclass
class Outcome:
    """All lines and all claims of one verification."""

    profile: str
    lines: list[Line] = field(default_factory=list)
    claims: list[Judged] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(line.status != FAILED for line in self.lines)

    @property
    def failures(self) -> list[str]:
        return [f"{line.what}: {line.why}" for line in self.lines if line.status == FAILED]

    def stamp(self) -> str:
        """What the first page of the PDF says of it."""
        if not self.ok:
            return f"Verification failed: {len(self.failures)} of {len(self.lines)} checks."
        done = sum(line.status == OK for line in self.lines)
        return f"Verified: {done} checks hold."


def verify(profile: str, root: Path | str = ".", *, quick: bool = False) -> Outcome:
    """Check results, prose and claims of a profile; `reference` checks what is committed alone.

    quick: leave out what takes more than a few seconds.

    Raises:
        ResultsError: no results of the profile, or the profile is `smoke`, whose numbers mean nothing.
        ConfigError: a fault in claims.yaml or tolerances.toml.
    """
    root = Path(root)
    if profile == "smoke":
        raise ResultsError("smoke: its numbers mean nothing, there is nothing to verify; take cpu or full")
    outcome, checked = Outcome(profile), root / "build" / "checked"
    if profile != REFERENCE:
        found = results_dir(profile, root)
        outcome.lines += regenerated(found, root / "results", kept=checked / f"{profile}.json")
    outcome.lines += _listed("reference", "committed files and numbers in the prose", seal_faults(root))
    outcome.lines += recomputed(root / "results", quick=quick, kept=checked / "recomputed.json")
    claims = load_claims(root / "paper" / "claims.yaml")
    outcome.claims = judge_claims(claims, results_dir(profile, root), strict=profile == REFERENCE)
    faults = text_faults(claims, outcome.claims, root / "paper" / "sections")
    outcome.lines += _listed("claims", "the text says what the numbers allow", faults)
    return outcome


def regenerated(found: Path, reference: Path, *, kept: Path | None = None) -> list[Line]:
    """A line for each file that was made anew. kept: as in `recomputed`."""
    tolerances = load_tolerances(reference / "tolerances.toml")
    if not found.is_dir():
        raise ResultsError(f"{found}: no results here; run `make paper` or one notebook first")
    if kept is None:
        return _compared(found, reference, tolerances)
    known = Kept(kept, folder_hash(found, skip=()), folder_hash(reference, skip=()), code=[__name__])
    lines = known.get("lines", lambda: [astuple(line) for line in _compared(found, reference, tolerances)])
    known.save()
    return [Line(*line) for line in lines]


def _compared(found: Path, reference: Path, tolerances: Tolerances) -> list[Line]:
    lines = []
    for file in compare_folders(found, reference, tolerances):
        counts = ", ".join(f"{n} {kind}" for kind, n in file.cells.items())
        notes = "; ".join([counts or "no cells", *file.notes])
        if set(file.cells) <= {"machine", "other profile"} and not file.faults:
            lines.append(Line("regenerated", file.file, SKIPPED, notes))
        elif not file.faults:
            lines.append(Line("regenerated", file.file, OK, notes))
        lines += [Line("regenerated", file.file, FAILED, fault) for fault in file.faults]
    return lines or [Line("regenerated", str(found), SKIPPED, "nothing that the reference holds")]


def recomputed(results: Path, *, quick: bool = False, kept: Path | None = None) -> list[Line]:
    """A line for each file that follows from others.

    kept: a file that keeps what was found, so that the same results are not computed again by the same code.
    """
    sealed, inside = sums(results.parent), f"{results.name}/"  # the checks read nothing else of it
    read = {name: value for name, value in sealed.items() if name.startswith(inside)}
    known = Kept(kept, read, code=["vqlora.report.recompute"]) if kept else None
    lines = []
    for check in CHECKS:
        what = f"{check.file} from {check.source}"
        if not check.ready(results):
            lines.append(Line("recomputed", what, SKIPPED, "not all of it is there"))
        elif quick and check.slow:
            lines.append(Line("recomputed", what, SKIPPED, "slow; `make verify` does it"))
        else:
            faults = partial(_faults, check, results)
            lines += _listed("recomputed", what, known.get(what, faults) if known else faults())
    if known:
        known.save()
    return lines


def _faults(check, results: Path) -> list[str]:
    return list(check.faults(results))


def _listed(part: str, what: str, faults: Iterable[str]) -> list[Line]:
    return [Line(part, what, FAILED, fault) for fault in faults] or [Line(part, what, OK)]


def show(outcome: Outcome) -> None:
    """Print checks and claims as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    colours = {OK: "green", FAILED: "red", SKIPPED: "dim", "supported": "green", "denied": "red",
               "undecided": "yellow", "not run": "dim"}  # fmt: skip

    def styled(word: str) -> str:
        return f"[{colours[word]}]{word}[/]"

    checks = Table("Part", "Checked", "Outcome", "", box=box.SIMPLE, title=f"Checks ({outcome.profile})")
    for line in outcome.lines:
        checks.add_row(line.part, line.what, styled(line.status), _plain(line.why))
    claims = Table("Claim", "Notebook", "Expected", "Found", "Verdict", box=box.SIMPLE, title="Claims")
    for origin, words in (("ours", "what the text says"), ("published", "published claims under test")):
        claims.add_row(f"[bold]{words}[/]")
        for j in (j for j in outcome.claims if j.claim.origin == origin):
            cells = (j.claim.claim, j.claim.notebook, plain(j.expected), plain(j.found))
            claims.add_row(*map(_plain, cells), styled(j.verdict))
    console.print(checks)
    console.print(claims)
    console.print(outcome.stamp())


def _plain(text: str) -> str:
    """Text in which rich finds no markup: intervals have brackets."""
    return text.replace("[", r"\[")
