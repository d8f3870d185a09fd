"""What a slow check found, kept under a hash of all that it read: the same is not worked out twice.

kept = Kept(Path("build/checked/recomputed.json"), sums(root), code=["vqlora.report.recompute"])
faults = kept.get("one.csv from two.csv", lambda: slow_check())     # a JSON value
kept.save()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from vqlora.files import write_atomic
from vqlora.identity import code_hash, digest

LIBRARIES = ("numpy", "pandas", "scipy", "statsmodels")  # which the checks compute with


class Kept:
    """Values by name, good while all that they were made from stays: files' hashes, code and libraries.

    path: a JSON file, written by `save`. A damaged one, or one of another key, counts as empty.
    """

    def __init__(self, path: Path, *read: Any, code: Iterable[str]):
        self.path = Path(path)
        self.key = digest(code_hash(code), [metadata.version(name) for name in LIBRARIES], *read)
        self._before = self._read()
        self._now = dict(self._before)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made if it is not known."""
        if name not in self._now:
            self._now[name] = make()
        return self._now[name]

    def save(self) -> None:
        """Write what has become known since."""
        if self._now != self._before:
            write_atomic(self.path, json.dumps({"key": self.key, "found": self._now}, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known["found"] if known.get("key") == self.key else {}
