"""Lines for people: durations and sizes in words, and one lock per profile that says who holds it."""
from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def say(*words: object) -> None:
    """Print one line at once, so that it keeps its place among the lines of child processes."""
    print(*words, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`8 s`, `3 min`, `1 h 20 min`: as exact as an estimate deserves."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold `path` exclusively, waiting for another process if need be and saying for whom.

    The kernel drops the lock with the process that holds it, so a killed holder blocks nobody; the note it
    left in the file is then reported and replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: {_holder(file) or 'another process'} holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        left = _holder(file)
        if left:
            say(f"taking over {path}: {left} ended without releasing it")
        _write(file, json.dumps({"pid": os.getpid(), "purpose": purpose, "since": time.strftime("%H:%M")}))
        try:
            yield
        finally:
            _write(file, "")


def _holder(file) -> str:
    file.seek(0)
    text = file.read().strip()
    try:
        note = json.loads(text)
        return f"process {note['pid']} ({note['purpose']}, since {note['since']})"
    except (ValueError, KeyError, TypeError):
        return f"a process that wrote {text[:40]!r}" if text else ""


def _write(file, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
