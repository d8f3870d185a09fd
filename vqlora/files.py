"""Writing files that are never half written, and saying in one line why one could not be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """A file or folder could not be written; the message is one line that names it and the reason."""


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, never half of it; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around code that writes `path`, or files in it: raises WriteError where the disk is what failed.

    Libraries tell a full disk in their own ways, torch without a reason: then a little more is written to
    learn it. Any other fault passes through.
    """
    try:
        yield
    except Exception as fault:
        known = isinstance(fault, OSError) and fault.errno
        number = fault.errno if known else _refusal(Path(path))
        if not number:
            raise
        raise WriteError(f"{path}: cannot be written ({os.strerror(number)})") from fault


def _refusal(path: Path) -> int | None:
    """The error number that writing beside `path` meets now, or None."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError as fault:
        return fault.errno
    return None
