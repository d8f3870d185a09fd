r"""The seal on what is committed: sums of the results and figures, and every number that the prose prints.

    write_seal(root)                        # results/SHA256SUMS, paper/numbers.csv
    seal_faults(root)                       # [] or one line for each thing that is not as it was sealed

``sha256sum -c results/SHA256SUMS`` reads the first, so that a reviewer needs nothing of ours to check it.
``paper/numbers.csv`` has, section by section, each key in the text with what it prints: another key in a
sentence, or another number under a key, shows there. Both are written when results are accepted (``make
accept``) and when a changed sentence is (``vqlora verify --seal``), and are read in review like code.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from vqlora.files import write_atomic
from vqlora.report.keys import collect

SUMS = "results/SHA256SUMS"
NUMBERS = "paper/numbers.csv"
SEALED = ("results/**/*.csv", "results/**/*.png", "results/**/*.json", "results/**/*.parquet",
          "results/tolerances.toml", "paper/claims.yaml", "figures/*.pdf", "figures/*.png")  # fmt: skip
KEYED = re.compile(r"\\(vq|vqci|vqcase|vqclaim|vqstates|vqfound|vqexpected)\{([^}]*)\}")
HEADS = ("section", "macro", "key", "prints")


def sealed_files(root: Path) -> list[str]:
    """Paths under `root` that the seal covers, sorted."""
    found = {path for pattern in SEALED for path in Path(root).glob(pattern) if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in found)


def sums(root: Path) -> dict[str, str]:
    """sha256 of every sealed file as it is now."""
    return {name: _sum(Path(root, name)) for name in sealed_files(root)}


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(root: Path) -> list[tuple[str, str, str, str]]:
    """Section, macro, key and what it prints, for every key in the text, in the order of the text."""
    keys = collect(Path(root, "results"))
    return [(name, macro, key, _prints(macro, keys.get(key))) for name, macro, key in keys_in_text(root)]


def keys_in_text(root: Path) -> Iterator[tuple[str, str, str]]:
    """Section, macro and key of every number, verdict and claim in the paper's sections."""
    for path in sorted(Path(root, "paper", "sections").glob("*.tex")):
        text = re.sub(r"(?<!\\)%.*", "", path.read_text(encoding="utf-8"))
        for macro, key in KEYED.findall(text):
            yield path.stem, macro, key


def _prints(macro: str, value) -> str:
    if value is None:
        return ""
    return value.interval if macro == "vqci" else value.text


def write_seal(root: Path) -> list[Path]:
    """Take results, figures and the numbers in the prose as they are now for the reference."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADS)
    table.writerows(numbers(root))
    written = [write_atomic(Path(root, NUMBERS), text.getvalue())]
    lines = [f"{digest}  {name}\n" for name, digest in sums(root).items()]
    return [*written, write_atomic(Path(root, SUMS), "".join(lines))]


def seal_faults(root: Path) -> list[str]:
    """What is not as it was sealed, one line each: a changed, missing or new file; a changed number in prose.

    A figure that this checkout has drawn for a profile (``make paper``) is no fault: ``make pdf`` puts the
    reference back.
    """
    root = Path(root)
    if not Path(root, SUMS).is_file():
        return [f"{SUMS}: missing; `vqlora verify --seal` writes it"]
    sealed = dict(reversed(line.split("  ", 1)) for line in Path(root, SUMS).read_text("utf-8").splitlines())
    now = sums(root)
    faults = [f"{name}: is not there any more" for name in sealed if name not in now]
    faults += [f"{name}: not sealed; `make accept` promotes results" for name in now if name not in sealed]
    changed = [name for name in now if sealed.get(name, now[name]) != now[name]]
    faults += [f"{name}: is not the file that was sealed" for name in changed
               if not _drawn_here(root, name, now[name])]  # fmt: skip
    return sorted(faults) + number_faults(root)


def _drawn_here(root: Path, name: str, digest: str) -> bool:
    copies = root.glob(f"build/*/paper/{name}") if name.startswith("figures/") else ()
    return any(_sum(path) == digest for path in copies)


def number_faults(root: Path) -> list[str]:
    """Numbers in the prose that are not those of ``paper/numbers.csv``, with section and key."""
    path = Path(root, NUMBERS)
    if not path.is_file():
        return [f"{NUMBERS}: missing; `vqlora verify --seal` writes it"]
    with path.open(newline="", encoding="utf-8") as file:
        before = [tuple(row) for row in csv.reader(file)][1:]
    after, faults = numbers(root), []
    for section in dict.fromkeys(row[0] for row in (*before, *after)):
        was, is_ = ([row[1:] for row in rows if row[0] == section] for rows in (before, after))
        if was == is_:
            continue
        place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(was, is_, strict=False)))
        old, new = (_say(rows[place]) if place < len(rows) else "nothing" for rows in (was, is_))
        faults.append(f"paper/sections/{section}.tex: number {place + 1} is {new}; sealed: {old}")
    return faults


def _say(row: tuple[str, ...]) -> str:
    macro, key, prints = row
    return f"\\{macro}{{{key}}}" + (f" = {prints}" if prints else "")
