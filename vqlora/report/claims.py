r"""What the paper claims, as data: ``paper/claims.yaml`` held against results files.

    claims = load_claims(Path("paper/claims.yaml"))
    judged = judge_claims(claims, Path("results"))       # claim -> expected, found, verdict

A claim names a number and what it expects of it. Its verdict is *supported* where the number and all of its
95% interval are as expected, *denied* where none of it is, *undecided* between, *not run* where the results
file is missing. In LaTeX ``\vqclaim{name}{supported}{denied}{undecided}{not run}`` picks the words,
``\vqstates{name}`` marks a sentence that is true only if the claim is supported, and ``\vqfound{name}``
prints the number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vqlora.config import Settings
from vqlora.files import write_atomic
from vqlora.report.cells import Table
from vqlora.report.keys import ResultsError, Value, collect, format_number, latex_text
from vqlora.settings_file import nearest, parse, read_mapping

VERDICTS = ("supported", "denied", "undecided", "not run")
MARKED = re.compile(r"\\(vqclaim|vqstates|vqfound|vqexpected)\{([^}]*)\}")


class Claim(Settings):
    """One claim: the number it is about, what is expected of it, and where the text says it."""

    claim: str
    origin: Literal["ours", "published"]
    notebook: str = Field(pattern=r"^\d\d_\w+$")
    said: tuple[str, ...] = ()  # sections whose text depends on it
    key: str
    against: str | None = None
    measure: Literal["value", "ratio", "reduction", "difference"] = "value"
    expect: Literal["verdict"] | None = None  # the verdict of a planned test, which has a margin of its own
    at_least: float | None = None
    at_most: float | None = None
    tolerance: float = Field(0.0, ge=0)  # of both bounds, in the unit of the number
    why: str = ""  # the reason of the tolerance
    needs: str | None = None  # the results file without which it was not run
    profile: str | None = None  # that runs it, where the notebook's results are of another one

    @model_validator(mode="after")
    def _is_whole(self) -> Claim:
        if (self.against is None) != (self.measure == "value"):
            raise ValueError(f"measure {self.measure!r} {'takes no' if self.against else 'needs'} against")
        bounded = self.at_least is not None or self.at_most is not None
        if bounded == (self.expect == "verdict"):
            raise ValueError("needs either expect: verdict or a bound (at_least, at_most)")
        if self.tolerance and not self.why:
            raise ValueError("a tolerance needs its reason (why)")
        return self

    @property
    def file(self) -> str:
        """The results file without which the claim was not run."""
        return self.needs or f"{self.notebook}/summary.csv"


class Claims(Settings):
    """The file."""

    claims: dict[str, Claim]


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict; ``expected`` and ``found`` are LaTeX."""

    name: str
    claim: Claim
    expected: str
    found: str
    verdict: str


def load_claims(path: Path) -> dict[str, Claim]:
    """Claims by name. Raises ConfigError, a line per fault: file, key, value, what is allowed."""
    claims = parse(Claims, read_mapping(path), path).claims
    for name in claims:
        if not re.fullmatch(r"[a-z0-9-]+", name):
            raise ResultsError(f"{path}: claims.{name}: a name may hold a-z 0-9 - only")
    return claims


def judge_claims(claims: Mapping[str, Claim], results: Path, *, strict: bool = True) -> list[Judged]:
    """Every claim against a results folder, in the order of the file.

    strict: a key that the results do not have is an error; else, for profiles with fewer domains or arms than
    the reference, the claim counts as not run.

    Raises:
        ResultsError: a claim names a key that is not there; the nearest one is named.
    """
    keys = collect(results)
    return [_judge(name, claim, keys, Path(results), strict) for name, claim in claims.items()]


def verdict(
    low: float, high: float, at_least: float | None, at_most: float | None, tolerance: float = 0.0
) -> str:
    """Verdict on a number known to lie from `low` to `high` (equal for a count).

    >>> verdict(0.2, 0.3, 0.25, None), verdict(0.26, 0.3, 0.25, None), verdict(0.2, 0.24, 0.25, None)
    ('undecided', 'supported', 'denied')
    """
    floor = float("-inf") if at_least is None else at_least - tolerance
    ceiling = float("inf") if at_most is None else at_most + tolerance
    if floor <= low and high <= ceiling:
        return "supported"
    return "denied" if high < floor or low > ceiling else "undecided"


def _judge(name: str, claim: Claim, keys: Mapping[str, Value], results: Path, strict: bool) -> Judged:
    metric = "share_frac" if claim.measure in ("ratio", "reduction") else claim.key
    expected = _expected(claim, metric)
    asked = {f"{claim.key}.verdict" if claim.expect else claim.key, claim.against} - {None}
    if not (results / claim.file).is_file() or not (strict or asked <= set(keys)):
        return Judged(name, claim, expected, "--", "not run")
    if claim.expect == "verdict":
        says, value = _key(name, f"{claim.key}.verdict", keys).text, keys.get(claim.key)
        if margin := keys.get(f"{claim.key}.margin"):
            expected = f"{expected}, margin {margin.text}"
        ends = [keys.get(f"{claim.key}.stated_{end}_frac") for end in ("low", "high")]
        if all(ends):
            expected = f"{ends[0].text} to {ends[1].text}"
        told = keys.get(f"{claim.key}.found_name")
        found = f"{value.text} {value.interval}".strip() if value else told.text if told else "--"
        return Judged(name, claim, expected, found, says)
    number, low, high = _measured(name, claim, keys)
    found = format_number(number, metric)
    if low < high:
        ends = (format_number(end, metric, unit=False) for end in (low, high))
        found += f" [{', '.join(ends)}]"
    said = verdict(low, high, claim.at_least, claim.at_most, claim.tolerance)
    return Judged(name, claim, expected, found, said)


def _measured(name: str, claim: Claim, keys: Mapping[str, Value]) -> tuple[float, float, float]:
    """Number and interval; of a ratio or difference the widest that both intervals allow."""
    first = _ends(_key(name, claim.key, keys))
    if claim.measure == "value":
        return first
    second = _ends(_key(name, claim.against, keys))
    combine = {
        "ratio": lambda a, b: a / b if b else math.nan,
        "reduction": lambda a, b: 1 - a / b if b else math.nan,
        "difference": lambda a, b: a - b,
    }[claim.measure]
    corners = [combine(a, b) for a, b in product(first[1:], second[1:])]
    return combine(first[0], second[0]), min(corners), max(corners)


def _ends(value: Value) -> tuple[float, float, float]:
    if isinstance(value.number, str):  # n/a: there was nothing to count
        return math.nan, math.nan, math.nan
    return (value.number, *(value.ends or (value.number, value.number)))


def _key(name: str, key: str, keys: Mapping[str, Value]) -> Value:
    if key not in keys:
        raise ResultsError(f"paper/claims.yaml: claims.{name}: no key {key!r}{nearest(key, keys)}")
    return keys[key]


def _expected(claim: Claim, metric: str) -> str:
    if claim.expect == "verdict":
        return "planned test" if claim.origin == "ours" else "as claimed"
    ends = (claim.at_least, claim.at_most)
    low, high = (None if end is None else format_number(end, metric) for end in ends)
    text = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    text = f"about {low}" if low == high else text
    if claim.tolerance:
        text += rf", \ensuremath{{\pm}}{format_number(claim.tolerance, metric, unit=False)}"
    return text


def text_faults(claims: Mapping[str, Claim], judged: list[Judged], sections: Path) -> list[str]:
    """What is wrong between the text and the claims: a claim that is not there, a sentence that is denied."""
    faults, said = [], {judge.name: judge.verdict for judge in judged}
    for path in sorted(sections.glob("*.tex")):
        text = re.sub(r"(?<!\\)%.*", "", path.read_text(encoding="utf-8"))
        used = MARKED.findall(text)
        for macro, name in used:
            if name not in claims:
                faults.append(f"{path.name}: \\{macro}{{{name}}}: no such claim{nearest(name, claims)}")
            elif macro == "vqstates" and said[name] != "supported":
                faults.append(f"{path.name}: states as a fact that {claims[name].claim}; it is {said[name]}")
        names = {name for _, name in used}
        placed = {name for name, claim in claims.items() if path.stem in claim.said}
        faults += [f"{path.name}: does not say claim {name!r}, which claims.yaml places there"
                   for name in sorted(placed - names)]  # fmt: skip
        faults += [f"{path.name}: says claim {name!r}; claims.yaml does not place it there"
                   for name in sorted(names & set(claims) - placed)]  # fmt: skip
    return faults


def claims_tex(judged: list[Judged]) -> str:
    """The LaTeX file that defines every claim."""
    lines = ["% Written by vqlora.report.claims from claims.yaml and results files; do not edit."]
    lines += [rf"\vqsetclaim{{{j.name}}}{{{j.verdict}}}{{{j.found}}}{{{j.expected}}}" for j in judged]
    return "\n".join(lines) + "\n"


def claims_table(judged: list[Judged]) -> Table:
    """Published claims under test, what was found here, verdict and notebook."""
    rows = [(latex_text(j.claim.claim), j.expected, j.found, j.verdict, latex_text(j.claim.notebook))
            for j in judged if j.claim.origin == "published"]  # fmt: skip
    heads = ("Published claim", "Expected", "Found", "Verdict", "Notebook")
    return Table(heads, tuple(rows), left=5, wide="6.2cm")


def write_claims(path: Path, results: Path, generated: Path) -> list[Path]:
    """Write ``<generated>/claims.tex`` and the table of published claims; the files written."""
    judged = judge_claims(load_claims(path), results, strict=False)
    table, folder = claims_table(judged), Path(generated)
    return [
        write_atomic(folder / "claims.tex", claims_tex(judged)),
        write_atomic(folder / "tables" / "claims.md", table.markdown()),
        write_atomic(folder / "tables" / "claims.tex", table.latex()),
    ]
