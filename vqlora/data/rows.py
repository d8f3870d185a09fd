"""What the loaders share: reading files with one clear error, finding videos, and keeping count of bad
rows."""
from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vqlora.data.clips import PARTS, Clip, LeftOut, Loaded, Segment

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".gif")  # in order of preference


class FormatError(ValueError):
    """Annotations that cannot be used at all; the message names the file and what was expected."""


class Videos:
    """Every video file below a folder, by file name without its ending. Raises FormatError without the
    folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FormatError(f"{folder}: no such folder; expected the videos in it or below it")
        found: dict[str, tuple[int, str]] = {}
        for base, folders, files in os.walk(folder):
            folders.sort()
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in VIDEO_SUFFIXES:
                    rank = (VIDEO_SUFFIXES.index(suffix.lower()), os.path.join(base, file))
                    found[stem] = min(found.get(stem, rank), rank)
        self._paths = {stem: Path(path) for stem, (_, path) in found.items()}

    def find(self, *stems: str) -> Path | None:
        return next((self._paths[stem] for stem in stems if stem in self._paths), None)


class Rows:
    """Collects the clips of one part and the rows that were left out."""

    def __init__(self, part: str, videos: Path | Videos):
        if part not in PARTS:
            raise FormatError(f"part {part!r} is not one of {', '.join(PARTS)}")
        self.part = part
        self.videos = videos if isinstance(videos, Videos) else Videos(videos)
        self.left_out: list[LeftOut] = []
        self._clips: dict[str, Clip] = {}

    def leave(self, source: Path, row: object, reason: str) -> None:
        self.left_out.append(LeftOut(str(source), str(row), reason))

    def texts(self, values: Any, source: Path, row: object) -> tuple[str, ...]:
        """The usable texts among `values`, each on one line without stray blanks; the others are listed."""
        good = []
        for value in values if isinstance(values, list | tuple) else [values]:
            text = " ".join(value.split()) if isinstance(value, str) else ""
            if text:
                good.append(text)
            else:
                reason = "empty caption" if isinstance(value, str) else "caption is not a text"
                self.leave(source, row, reason)
        return tuple(good)

    def add(self, source: Path, name: str, captions: Mapping[str, tuple[str, ...]], *,
            stem: str | None = None, whole: str | None = None, span: tuple[float, float] | None = None,
            segments: tuple[Segment, ...] = ()) -> None:
        """Take a clip, or list why not. Its video is `<name>` or `<stem>`, else span (s) of `<whole>`."""
        captions = {language: texts for language, texts in captions.items() if texts}
        path = self.videos.find(name, stem or name)
        cut = path is None and whole is not None and span is not None
        if cut:
            path = self.videos.find(whole)
        if name in self._clips:
            self.leave(source, name, "listed twice; the first is kept")
        elif not captions:
            self.leave(source, name, "no caption")
        elif path is None:
            self.leave(source, name, f"no video file in {self.videos.folder}")
        elif cut and not span[0] < span[1]:
            self.leave(source, name, f"ends ({span[1]:g} s) before it starts ({span[0]:g} s)")
        else:
            start_s, end_s = span if cut else (None, None)
            self._clips[name] = Clip(name, path, self.part, captions, (), segments, None, start_s, end_s)

    def done(self, source: Path) -> Loaded:
        """The result; raises when the files held no row of this part at all."""
        if not self._clips and not self.left_out:
            raise FormatError(f"{source}: no clips of part {self.part!r}")
        return Loaded(tuple(self._clips.values()), tuple(dict.fromkeys(self.left_out)))


def part_files(annotations: Path, names: Mapping[str, tuple[str, ...]], part: str, title: str) -> list[Path]:
    """The files of a part: `annotations` itself if it is a file, else those of `names[part]` that lie in
    it."""
    if annotations.is_file():
        return [annotations]
    found = [annotations / name for name in names[part] if (annotations / name).is_file()]
    if not found:
        wanted = " or ".join(names[part])
        raise FormatError(f"{annotations}: no {title} annotations of part {part!r}; expected {wanted}")
    return found


def read_bytes(path: Path, expected: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None


def read_text(path: Path, expected: str) -> str:
    try:
        return read_bytes(path, expected).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}; expected {expected}") from None


def read_json(path: Path, kind: type, expected: str) -> Any:
    try:
        value = json.loads(read_text(path, expected))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise FormatError(f"{path}: broken JSON at {where} ({error.msg}); expected {expected}") from None
    if not isinstance(value, kind):
        raise FormatError(f"{path}: holds a {type(value).__name__}; expected {expected}")
    return value


def read_csv(path: Path, columns: Iterable[str], expected: str) -> list[dict[str, str | None]]:
    """Rows of a comma-separated file by column name; raises when one of `columns` is not in the header."""
    reader = csv.DictReader(io.StringIO(read_text(path, expected), newline=""))
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise FormatError(f"{path}: no column {missing[0]!r} in the header; expected {expected}")
    return list(reader)
