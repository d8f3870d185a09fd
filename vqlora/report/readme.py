"""Tables of README.md, between `<!-- table: name -->` and `<!-- end -->`, from results files."""

from __future__ import annotations

import re
from pathlib import Path

from vqlora.files import write_atomic
from vqlora.report.tables import TABLES

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """`text` with every marked table made anew. Raises KeyError for an unknown name, ResultsError for a
    missing file."""
    return _BLOCK.sub(lambda found: found[1] + TABLES[found[2]](Path(results)).markdown() + found[3], text)


def renew(root: Path) -> bool:
    """Renew the README of a checkout from its committed results; whether anything changed."""
    path = Path(root, "README.md")
    old = path.read_text(encoding="utf-8")
    new = fill(old, Path(root, "results"))
    if new != old:
        write_atomic(path, new)
    return new != old
