"""What the loaders share: reading files with one clear error, finding videos, and keeping count of bad
rows."""
from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqlora.data.clips import PARTS, Clip, LeftOut, Loaded, Noted, Segment

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".gif")  # in order of preference


class FormatError(ValueError):
    """Annotations that cannot be used at all; the message names the file and what was expected."""


def walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, links to folders followed, each folder once."""
    seen = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        here = os.stat(base)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        yield from (os.path.join(base, file) for file in sorted(files))


class Videos:
    """Every video file below a folder, by file name without its ending; links to folders are followed.
    Raises FormatError without the folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FormatError(f"{folder}: no such folder; expected the videos in it or below it")
        self._paths: dict[str, Path] = {}
        self._others: dict[str, list[str]] = {}
        found: dict[str, list[tuple[int, str]]] = {}
        for path in walk(self.folder):
            stem, suffix = os.path.splitext(os.path.basename(path))
            if suffix.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, []).append((VIDEO_SUFFIXES.index(suffix.lower()), path))
        for stem, paths in found.items():
            first, *rest = sorted(paths)
            self._paths[stem] = Path(first[1])
            if rest:
                self._others[stem] = [os.path.relpath(path, folder) for _, path in rest]

    def __len__(self) -> int:
        return len(self._paths)

    def find(self, *stems: str) -> Path | None:
        return next((self._paths[stem] for stem in stems if stem in self._paths), None)

    def others(self, path: Path) -> list[str]:
        """Files of the same name that `find` passes over, from the folder."""
        return self._others.get(path.stem, [])


class Rows:
    """Collects the clips of one part, the rows that were left out, and those that were mended.

    `videos` is where `add` looks for files. `ids` is a list of the clips to take, where not all are."""

    def __init__(self, part: str, videos: Path | Videos | None = None, ids: Path | None = None):
        if part not in PARTS:
            raise FormatError(f"part {part!r} is not one of {', '.join(PARTS)}")
        self.part, self.ids, self.read = part, ids, 0
        self.videos = videos if isinstance(videos, Videos) or videos is None else Videos(videos)
        self.left_out: list[LeftOut] = []
        self.noted: list[Noted] = []
        self._clips: dict[str, Clip] = {}
        self._missing = None if ids is None else dict.fromkeys(read_ids(ids, self))
        self._wanted = None if self._missing is None else set(self._missing)

    def wants(self, name: object) -> bool:
        """Whether a clip is on the list of ids; all are where there is no list."""
        if self._wanted is None:
            return True
        self._missing.pop(name, None)
        return name in self._wanted

    def leave(self, source: Path, row: object, reason: str, *, read: int = 0) -> None:
        """List a row that is not used; `read` texts of it are counted as read."""
        self.read += read
        self.left_out.append(LeftOut(str(source), str(row), reason))

    def note(self, source: Path, row: object, reason: str) -> None:
        """List a row that is used, though it was mended or is odd."""
        self.noted.append(Noted(str(source), str(row), reason))

    def texts(self, values: Any, source: Path, row: object) -> tuple[str, ...]:
        """The usable texts among `values`, each on one line without stray blanks; the others are listed."""
        good = []
        for value in values if isinstance(values, list | tuple) else [values]:
            self.read += 1
            text = " ".join(value.split()) if isinstance(value, str) else ""
            if text:
                good.append(text)
                if re.search(r"[\t\r\n]", value.strip()):
                    self.note(source, row, "tab or line break in a text; a blank stands for it")
            else:
                reason = "empty caption" if isinstance(value, str) else "caption is not a text"
                self.leave(source, row, reason)
        return tuple(good)

    def add(self, source: Path, name: str, captions: Mapping[str, tuple[str, ...]], *,
            stem: str | None = None, whole: str | Sequence[str] | None = None,
            span: tuple[float, float] | None = None, segments: tuple[Segment, ...] = ()) -> None:
        """Take a clip, or list why not. Its video is `<name>` or `<stem>`, else span (s) of `<whole>`."""
        captions = {language: texts for language, texts in captions.items() if texts}
        path = self.videos.find(name, stem or name)
        cut = path is None and whole is not None and span is not None
        if cut:
            path = self.videos.find(*([whole] if isinstance(whole, str) else whole))
        if name in self._clips:
            self.leave(source, name, "listed twice; the first is kept")
        elif not captions:
            self.leave(source, name, "no caption")
        elif path is None:
            self.leave(source, name, f"no video file: {name} in {self.videos.folder}")
        elif cut and not span[0] < span[1]:
            self.leave(source, name, f"ends before it starts: {span[1]:g} s, {span[0]:g} s")
        else:
            start_s, end_s = span if cut else (None, None)
            if self.videos.others(path):
                self.note(source, name, "several video files: the first of "
                          + ", ".join([path.suffix, *{Path(p).suffix: 0 for p in self.videos.others(path)}]))
            self.take(source, Clip(name, path, self.part, captions, (), segments, None, start_s, end_s))

    def take(self, source: Path, clip: Clip) -> None:
        """Take a clip as it is. Captions that repeat one are kept as references, and noted."""
        for texts in clip.captions.values():
            for number in range(1, len(texts)):
                if texts[number] in texts[:number]:
                    self.note(source, f"{clip.id} caption {number}", "repeats a caption; both are kept")
        self._clips[clip.id] = clip

    def done(self, source: Path) -> Loaded:
        """The result; raises when the files held no row of this part at all."""
        for name in self._missing or ():
            self.leave(self.ids, name, f"no such video: {name!r} is not in the annotations")
        if not self._clips and not self.left_out:
            raise FormatError(f"{source}: no clips of part {self.part!r}")
        left_out, noted = (tuple(dict.fromkeys(rows)) for rows in (self.left_out, self.noted))
        return Loaded(tuple(self._clips.values()), left_out, noted, self.read)


def part_files(annotations: Path | Sequence[Path], names: Mapping[str, tuple[str, ...]], part: str,
               title: str) -> list[Path]:
    """The files of a part: `annotations` itself if it is a file or several, else those of `names[part]` that
    lie in it."""
    if not isinstance(annotations, str | Path):
        return [Path(path) for path in annotations]
    folder = Path(annotations)
    if folder.is_file():
        return [folder]
    found = [folder / name for name in names[part] if (folder / name).is_file()]
    if not found:
        wanted = " or ".join(names[part])
        raise FormatError(f"{folder}: no {title} annotations of part {part!r}; expected {wanted}")
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


def read_table(path: Path, columns: Sequence[str],
               expected: str) -> Iterator[tuple[int, dict[str, str | None], str]]:
    """Rows of a CSV file with a header: (line, cells by column, what was odd about it or "").

    Commas, semicolons and tabs separate, whichever makes `columns` stand in the header. Each line is a row of
    its own, so that a stray quote costs nothing but itself; cells beyond the header belong to the last
    column, which is a sentence whose commas nobody quoted.
    """
    lines = re.split(r"\r\n|\n|\r", read_text(path, expected))
    for mark in ",;\t":
        header = [name.strip() for name in _cells(lines[0], mark)[0]]
        if set(columns) <= set(header):
            break
    else:
        missing = [name for name in columns if name not in _cells(lines[0], ",")[0]]
        raise FormatError(f"{path}: line 1: no column {missing[0]!r} in the header {lines[0][:60]!r}; "
                          f"expected {expected}")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells, odd = _cells(line, mark)
        if len(cells) > len(header):
            last = len(header) - 1
            cells, odd = [*cells[:last], mark.join(cells[last:])], odd or "separator in an unquoted sentence"
        yield number, dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=True)), odd


def _cells(line: str, mark: str) -> tuple[list[str], str]:
    try:
        return next(csv.reader([line], delimiter=mark, strict=True), []), ""
    except csv.Error:
        return [cell.strip().strip('"') for cell in line.split(mark)], "stray quote"


def read_ids(path: Path, rows: Rows) -> list[str]:
    """Ids of clips: a JSON list, a CSV file with the column `video_id`, or plain text, an id a line."""
    expected = "clip ids: a JSON list, a CSV file with the column video_id, or one id a line"
    if Path(path).suffix == ".json":
        names = read_json(path, list, expected)
    else:
        lines = [line.strip() for line in re.split(r"\r\n|\n|\r", read_text(path, expected))]
        if re.search(r"(^|[,;\t])\"?video_id\"?($|[,;\t])", lines[0]):
            table = read_table(path, ["video_id"], expected)
            names = [(row["video_id"] or "").strip() for _, row, _ in table]
        else:
            names = [line for line in lines if line]
    seen: dict[str, None] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            rows.leave(path, f"row {number}", "no id")
        elif name in seen:
            rows.note(path, f"row {number}", "id listed twice")
        else:
            seen[name] = None
    if not seen:
        raise FormatError(f"{path}: no ids; expected {expected}")
    return list(seen)
