"""Regenerated results against the reference, cell by cell, as near as ``results/tolerances.toml`` wants.

rules = load_tolerances(Path("results/tolerances.toml"))
for file in compare_folders(Path("build/cpu/results"), Path("results"), rules): ...
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import Field, model_validator

from vqlora.config import ConfigError, Settings
from vqlora.settings_file import parse

# Of a manifest: what makes two machines of one kind, beside torch.
LIKE = ("profile", "processor", "processor_flags")
SHOWN = 5  # differing cells that a file tells of


class Rule(Settings):
    """One rule: where it holds, how near is near enough, and why."""

    files: tuple[str, ...]
    metrics: tuple[str, ...] = ("*",)
    kind: Literal["exact", "numeric", "statistical", "machine"]
    relative: float = Field(0.0, ge=0)
    absolute: float = Field(0.0, ge=0)
    elsewhere: Literal["statistical", "machine"] = "statistical"  # numeric, on another kind of machine
    spread: float | None = Field(None, ge=0)  # `absolute` where a numeric rule is used as a statistical one
    share: float = Field(0.0, ge=0)  # `relative` there
    empty: bool = False  # and a cell may be empty there in one of the two: nothing to count
    why: str = Field(min_length=10)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Rule:
        if self.kind in ("exact", "machine") and (self.relative or self.absolute):
            raise ValueError(f"kind {self.kind!r} takes no relative or absolute")
        return self


class Whole(Settings):
    """Cells about all arms, domains, seeds or clips that a profile has, by what is in their rows' names."""

    files: tuple[str, ...]
    rows: tuple[str, ...] = ()  # all rows of these files where none is named
    metrics: tuple[str, ...] = ("*",)
    why: str = Field(min_length=10)


class OfSome(Settings):
    """Files that only some profiles write."""

    files: tuple[str, ...]
    why: str = Field(min_length=10)


class Tolerances(Settings):
    """The file: what names a row, the rules, first match first, and which rows are of one profile alone."""

    rows: dict[str, tuple[str, ...]] = {}
    rule: tuple[Rule, ...]
    whole: tuple[Whole, ...] = ()
    optional: tuple[OfSome, ...] = ()

    def is_optional(self, file: str) -> bool:
        return any(fnmatchcase(file, pattern) for some in self.optional for pattern in some.files)

    def is_whole(self, file: str, key: tuple, metric: str) -> bool:
        """Whether a cell tells of a whole profile, so that another profile's cannot be held against it."""
        fits = [w for w in self.whole if any(fnmatchcase(file, p) for p in w.files)
                and any(fnmatchcase(metric, p) for p in w.metrics)]  # fmt: skip
        return any(not w.rows or set(w.rows) & set(key) for w in fits)

    def of(self, file: str, metric: str) -> Rule:
        """The first rule that fits. Raises ConfigError if none does."""
        for rule in self.rule:
            if any(fnmatchcase(file, p) for p in rule.files) and any(
                fnmatchcase(metric, p) for p in rule.metrics
            ):
                return rule
        raise ConfigError(f"results/tolerances.toml: rule: none fits {file}, {metric}")


@dataclass
class Compared:
    """What comparing one file came to: cells by kind of rule, and what differs in words."""

    file: str
    cells: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_tolerances(path: Path) -> Tolerances:
    """Read and check the file. Raises ConfigError naming file, key and value."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except tomllib.TOMLDecodeError as fault:
        raise ConfigError(f"{path}: not TOML ({fault})") from None
    return parse(Tolerances, values, path)


def compare_folders(found: Path, reference: Path, tolerances: Tolerances) -> list[Compared]:
    """Every CSV file of the reference's numbered folders that `found` has made anew, one after the other.

    A notebook that `found` has not run is passed over; a file that its notebook no longer writes is a fault.
    """
    compared = []
    for folder in sorted(path for path in Path(reference).glob("[0-9]*") if path.is_dir()):
        own = Path(found, folder.name)
        if not any(own.glob("*.csv")):
            continue
        same, alike = _likeness(own, folder)
        for path in sorted(folder.glob("*.csv")):
            name, one = f"{folder.name}/{path.name}", own / path.name
            if one.is_file():
                compared.append(compare_file(name, one, path, tolerances, same=same, alike=alike))
            elif (own / "manifest.json").is_file():  # it ran to its end
                wanted = same and not tolerances.is_optional(name)
                told = {"faults": ["not written"]} if wanted else {"notes": ["not written by this profile"]}
                compared.append(Compared(name, **told))
    return compared


def compare_file(
    name: str, found: Path, reference: Path, tolerances: Tolerances, *, same: bool = True, alike: bool = True
) -> Compared:
    """One file against its reference.

    same: both are of one profile. alike: and of one kind of machine; else numeric rules are statistical.
    """
    out = Compared(name)
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in (found, reference)]
    columns = [", ".join(table.columns) for table in tables]
    if columns[0] != columns[1] and same:
        out.faults.append(f"columns {columns[0]}; reference: {columns[1]}")
        return out
    if alone := sorted(set(tables[0]) ^ set(tables[1])):  # kinds of question that no clip was asked, say
        out.notes.append(f"columns of one profile alone: {', '.join(alone)}")
        tables = [table.drop(columns=alone, errors="ignore") for table in tables]
    rows = _row_names(name, tables[1], tolerances)
    mine, theirs = (_by_row(table, rows) for table in tables)
    missing, more = [key for key in theirs if key not in mine], [key for key in mine if key not in theirs]
    for keys, words in ((missing, "is missing"), (more, "is not in the reference")):
        if keys:
            count = f" ({len(keys)} such rows)" if len(keys) > 1 else ""
            told = out.faults if same and keys is missing else out.notes
            told.append(f"row {_say(keys[0])} {words}{count}")
    wrong = []
    for key in (key for key in theirs if key in mine):
        wrong += _compare_row(out, name, key, mine[key], theirs[key], rows, tolerances, same, alike)
    out.faults += wrong[:SHOWN] + ([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])
    return out


def _compare_row(out, name, key, mine, theirs, rows, tolerances, same, alike) -> list[str]:
    wrong = []
    keyed = "metric" in theirs
    for column, reference in theirs.items():
        if column in rows:
            continue
        in_row = keyed and column in ("value", "low", "high", "predicted")
        metric = theirs["metric"] if in_row else column
        rule = tolerances.of(name, metric)
        kind = rule.kind
        if kind == "numeric" and not alike:
            kind = rule.elsewhere
        if kind == "statistical" and rule.kind == "numeric" and _is_text(reference):
            kind = "machine"  # words of a model that was trained elsewhere
        # Ends of an interval over other seeds: what lies between is compared. Empty: nothing to count there.
        gone = column in ("low", "high") or "" in (mine[column], reference)
        if kind == "statistical" and rule.empty and "" in (mine[column], reference):
            kind = "machine"
        if not same and (kind == "exact" or gone or tolerances.is_whole(name, key, metric)):
            kind = "other profile"
        out.cells[kind] = out.cells.get(kind, 0) + 1
        if kind in ("machine", "other profile") or mine[column] == reference:
            continue
        allowed = _allowed(rule, kind, mine, theirs, column)
        if not _near(mine[column], reference, allowed):
            where = f"{_say(key)}, {column}" if not in_row or column != "value" else _say(key)
            bound = f", allowed {allowed:.2g}" if allowed else ""
            pair = f"{mine[column] or 'empty'}; reference {reference or 'empty'}"
            wrong.append(f"{where}: {pair} ({kind}{bound})")
    return wrong


def _allowed(rule: Rule, kind: str, mine: Mapping, theirs: Mapping, column: str) -> float:
    """The difference that a cell may have. A statistical one: both half intervals together, or the spread."""
    number = _number(theirs[column])
    if kind == "exact" or number is None:
        return 0.0
    if kind == "numeric":
        return rule.absolute + rule.relative * abs(number)
    absolute = rule.absolute if rule.spread is None else rule.spread
    halves = [_half(row) for row in (mine, theirs)]
    return max(absolute, max(rule.relative, rule.share) * abs(number), math.hypot(*halves))


def _half(row: Mapping) -> float:
    low, high = _number(row.get("low", "")), _number(row.get("high", ""))
    return 0.0 if low is None or high is None else (high - low) / 2


def _near(mine: str, reference: str, allowed: float) -> bool:
    a, b = _number(mine), _number(reference)
    return mine == reference if a is None or b is None else abs(a - b) <= allowed


def _is_text(cell: str) -> bool:
    return cell not in ("", "True", "False") and _number(cell) is None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _row_names(name: str, table: pd.DataFrame, tolerances: Tolerances) -> list[str]:
    if name in tolerances.rows:
        return list(tolerances.rows[name])
    columns = list(table.columns)
    if "metric" in columns and "value" in columns:
        return columns[: columns.index("metric") + 1]
    return []


def _by_row(table: pd.DataFrame, rows: list[str]) -> dict[tuple, dict[str, str]]:
    """Rows by what names them; by line where nothing does, or where a name occurs again."""
    named, seen = {}, {}
    for line, row in enumerate(table.to_dict("records"), 1):
        key = tuple(row[column] for column in rows) if rows else (f"line {line}",)
        seen[key] = seen.get(key, 0) + 1
        named[(*key, f"#{seen[key]}") if seen[key] > 1 else key] = row
    return named


def _say(key: tuple) -> str:
    return " ".join(part for part in key if part)


def _likeness(found: Path, reference: Path) -> tuple[bool, bool]:
    """Whether two notebooks' results are of one profile, and of one kind of machine.

    Profiles of one name may have changed: where both manifests hold a hash of the settings, that decides.
    """
    both, settings = [], []
    for folder in (found, reference):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return True, False
        settings.append(manifest.get("settings"))
        both.append([manifest.get(name) for name in LIKE] + [manifest.get("versions", {}).get("torch")])
    same = settings[0] == settings[1] if all(settings) else both[0][0] == both[1][0]
    return same, same and both[0][1:] == both[1][1:]
