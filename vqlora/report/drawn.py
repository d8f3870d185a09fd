"""Figures are drawn once: beside a folder of them lies what they were drawn from.

    draw(results, folder, style)     # half a minute, then nothing until results, code or style change
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vqlora.files import write_atomic
from vqlora.identity import code_hash, digest


def draw(results: Path, folder: Path, style: Path) -> list[Path]:
    """Every figure of a results folder, as files in `folder`; drawn unless they are there, unchanged.

    Raises:
        ResultsError: a results file is missing or not of the form needed.
    """
    note = folder.with_suffix(".json")
    wanted = _drawn_from(Path(results), Path(style))
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    files = known.get("files", {})
    if known.get("from") == wanted and files == _hashes(folder / name for name in files):
        return [folder / name for name in files]
    from vqlora.report.plots import write_figures  # matplotlib takes a second to import

    note.unlink(missing_ok=True)
    written = write_figures(results, folder, style)
    for name in files.keys() - {path.name for path in written}:
        (folder / name).unlink(missing_ok=True)              # of a figure that is no more
    write_atomic(note, json.dumps({"from": wanted, "files": _hashes(written)}, indent=1) + "\n")
    return written


def _drawn_from(results: Path, style: Path) -> str:
    files = [path for form in ("csv", "png") for path in sorted(results.glob(f"[0-9]*/*.{form}"))]
    hashes = [[f"{path.parent.name}/{path.name}", _hash(path)] for path in (*files, style) if path.is_file()]
    return digest(code_hash(["vqlora.report.plots"]), hashes)


def _hashes(paths) -> dict[str, str]:
    return {path.name: _hash(path) for path in paths if path.is_file()}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
