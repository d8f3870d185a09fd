"""One's own data: a JSON object a line with a video's path and its texts."""
from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqlora.data.clips import PARTS, Clip, Loaded, Question
from vqlora.data.formats.questions import question_of
from vqlora.data.rows import VIDEO_SUFFIXES, FormatError, Rows, read_text

JSONL_FILE = "captions.jsonl"
KEYS = ("video", "captions", "questions", "part", "start", "end")
VAL_SHARE = 5  # without parts, one video in so many is for validation
_FORM = '{"video": "clips/a.mp4", "captions": ["..."]} a line'


def load_jsonl(annotations: Path, *, part: str) -> Loaded:
    """Read one's own captions: `annotations` is a `.jsonl` file, or the folder with `captions.jsonl`.

    Keys of a line: `video`, a path from the file's folder; `captions`, a text, a list of texts (English), or
    lists by language code; `questions`, a list of {question, answer}, with `choices` and `kind` if wanted;
    `part`, one of train, val, devtest, test; `start` and `end`, seconds, where a clip is a stretch of its
    video. Several lines of one clip add up. Where no line has a `part`, one video in five is of `val`, chosen
    by a hash of its path, the others of `train`. A clip's id is its path as written (and its stretch).
    """
    path = Path(annotations)
    path = path / JSONL_FILE if path.is_dir() else path
    rows = Rows(part)
    clips: dict[str, _Row] = {}
    for number, row in _lines(path, rows):
        label = f"line {number}"
        video, reason = row.get("video"), _fault(row)
        if reason:
            rows.leave(path, label, reason)
            continue
        span = None if row.get("start") is None and row.get("end") is None else (
            float(row.get("start") or 0.0), math.inf if row.get("end") is None else float(row["end"]))
        name = video if span is None else f"{video}#{span[0]:g}-{span[1]:g}"
        kept = clips.setdefault(name, _Row(video, span, row.get("part"), number))
        if kept.part != row.get("part"):
            where = f"{kept.part!r} on line {kept.line}"
            rows.leave(path, label, f"two parts: {row.get('part')!r}, but {where}")
        else:
            kept.rows.append((label, row))
    named = any(kept.part is not None for kept in clips.values())
    for name, kept in clips.items():
        its_part = kept.part or (None if named else _part_of(kept.video))
        if its_part is None:
            rows.leave(path, f"line {kept.line}", "no part: other lines have one")
        elif its_part == part:
            _add(path, name, kept, rows)
    return rows.done(path)


def parts_of(annotations: Path) -> tuple[str, ...]:
    """The parts that a file's lines name, or those that it is split into where none does."""
    path = Path(annotations)
    path = path / JSONL_FILE if path.is_dir() else path
    named = {row["part"] for _, row in _lines(path, Rows("train")) if row.get("part") in PARTS}
    return tuple(part for part in PARTS if part in (named or {"train", "val"}))


@dataclass
class _Row:
    """The lines of one clip."""

    video: str
    span: tuple[float, float] | None
    part: str | None
    line: int
    rows: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)


def _lines(path: Path, rows: Rows):
    """(line number, object) of each usable line. Raises FormatError where there is none."""
    first, good = None, 0
    for number, line in enumerate(read_text(path, _FORM).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reason = None if isinstance(row, dict) else f"no object: holds a {type(row).__name__}"
        except json.JSONDecodeError as error:
            reason = f"broken JSON: column {error.colno} ({error.msg})"
        if reason:
            first = first or (number, reason, line.strip()[:60])
            rows.leave(path, f"line {number}", reason)
        else:
            good += 1
            yield number, row
    if not good:
        what = f"line {first[0]}: {first[1]}: {first[2]!r}" if first else "is empty"
        raise FormatError(f"{path}: {what}; expected {_FORM}")


def _fault(row: Mapping[str, Any]) -> str | None:
    """Why a line cannot be used at all."""
    for key in row:
        if key not in KEYS:
            return f"unknown key: {key!r}; allowed: {', '.join(KEYS)}"
    if not isinstance(row.get("video"), str) or not row["video"].strip():
        return f"no path: video is {row.get('video')!r}"
    if row.get("part") is not None and row["part"] not in PARTS:
        return f"unknown part: {row['part']!r} is not one of {', '.join(PARTS)}"
    for key in ("start", "end"):
        value = row.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value >= 0):
            return f"no seconds: {key} is {value!r}"
    if row.get("end") is not None and row["end"] <= (row.get("start") or 0):
        return f"ends before it starts: {row['end']:g} s, {row.get('start') or 0:g} s"
    return None


def _add(path: Path, name: str, kept: _Row, rows: Rows) -> None:
    captions: dict[str, tuple[str, ...]] = {}
    questions: list[Question] = []
    for label, row in kept.rows:
        given = row.get("captions", ())
        for language, texts in (given if isinstance(given, dict) else {"en": given}).items():
            captions[language] = captions.get(language, ()) + rows.texts(texts, path, label)
        asked = row.get("questions") or []
        for number, one in enumerate(asked if isinstance(asked, list) else [asked]):
            question, reason = question_of(one) if isinstance(one, dict) else (None, "question is no object")
            if reason:
                rows.leave(path, f"{label} question {number}", reason, read=1)
            else:
                rows.read += 1
                questions.append(question)
    video = path.parent / kept.video
    start, end = kept.span or (None, None)
    end = None if end == math.inf else end
    captions = {language: texts for language, texts in captions.items() if texts}
    label = f"line {kept.line}"
    if not captions and not questions:
        rows.leave(path, label, "no caption and no question")
    elif video.suffix.lower() not in VIDEO_SUFFIXES:
        rows.leave(path, label, f"no video ending: {video.suffix!r} is not one of {' '.join(VIDEO_SUFFIXES)}")
    elif not os.path.isfile(video):
        rows.leave(path, label, f"no video file: {kept.video}")
    else:
        rows.take(path, Clip(name, video, rows.part, captions, tuple(questions), (), None, start, end))


def _part_of(video: str) -> str:
    return "val" if hashlib.sha256(video.encode()).digest()[0] % VAL_SHARE == 0 else "train"
