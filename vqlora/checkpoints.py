"""Checkpoints that count only when they are whole: a marker with the sizes of all files is written last.

Where several processes train together, each writes its random state into the same folder: the marker waits
for all of them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback

from vqlora import processes
from vqlora.files import writing

MARKER = "complete.json"
_log = logging.getLogger(__name__)


class MarkWhole(TrainerCallback):
    """After a checkpoint's last file: push all to disk, then write the marker in one move."""

    def on_save(self, args, state, control, **kwargs):
        processes.wait()
        if processes.first():
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            with writing(folder):
                _mark(folder)


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint whose files all have the sizes its marker names; half-written ones go."""
    found = []
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:
            sizes = json.loads((path / MARKER).read_text())
            whole = sizes == _sizes(path)
        except (OSError, ValueError):
            whole = False
        if whole:
            found.append(path)
        else:
            _log.warning("%s was only half written; it is removed", path)
            shutil.rmtree(path, ignore_errors=True)
    return found[-1] if found else None


def _mark(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    part = folder / (MARKER + ".part")
    part.write_text(json.dumps(_sizes(folder)))
    part.replace(folder / MARKER)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MARKER, MARKER + ".part")
    }
