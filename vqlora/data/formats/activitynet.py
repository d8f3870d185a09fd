"""ActivityNet Captions: timed sentences of long videos, read as paragraphs or as one clip a segment."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqlora.data.clips import Loaded, Segment
from vqlora.data.rows import FormatError, Rows, Videos, part_files, read_json
from vqlora.data.writers import ACTIVITYNET_FILES

TASKS = ("paragraph", "segments")


def load_activitynet(annotations: Path | Sequence[Path], videos: Path | Videos, *, part: str,
                     task: str = "paragraph", ids: Path | None = None) -> Loaded:
    """Read ActivityNet Captions: `annotations` is its folder (`ACTIVITYNET_FILES`), or files of this part.

    Task "paragraph": a clip is a whole video, its id the key as published (`v_...`), `segments` its timed
    sentences, and its reference captions the paragraphs they form: two for validation clips that `val_2.json`
    describes as well, whose segments follow those of `val_1.json`. Task "segments": a clip is one segment,
    `<key>#<number>`, with its sentence; numbers count on from `val_1.json` to `val_2.json`. Segments that are
    reversed or start past the end are left out one by one; an end past the video's is cut to it, and noted.
    """
    if task not in TASKS:
        raise FormatError(f"ActivityNet Captions: task {task!r} is not one of {', '.join(TASKS)}")
    rows = Rows(part, videos, ids)
    files = part_files(annotations, ACTIVITYNET_FILES, part, "ActivityNet Captions")
    segments: dict[str, list[Segment]] = {}
    paragraphs: dict[str, list[str]] = {}
    numbers: dict[str, list[int]] = {}
    counted: dict[str, int] = {}
    for path in files:
        table = read_json(path, dict, "ActivityNet Captions: {v_id: {duration, timestamps, sentences}}")
        for name, row in table.items():
            if not rows.wants(name):
                continue
            found, asked = _segments(path, name, row, rows)
            segments.setdefault(name, []).extend(found.values())
            numbers.setdefault(name, []).extend(counted.get(name, 0) + number for number in found)
            counted[name] = counted.get(name, 0) + asked
            if found:
                paragraphs.setdefault(name, []).append(" ".join(s.text for s in found.values()))
    for name, found in segments.items():
        stem = name.removeprefix("v_")
        if task == "paragraph" or not found:
            captions = {"en": tuple(paragraphs.get(name, ()))}
            rows.add(files[0], name, captions, stem=stem, segments=tuple(found))
            continue
        for number, one in zip(numbers[name], found, strict=True):
            rows.add(files[0], f"{name}#{number}", {"en": (one.text,)}, whole=(name, stem),
                     span=(one.start_s, one.end_s))
    return rows.done(files[0])


def _segments(path: Path, name: str, row: Any, rows: Rows) -> tuple[dict[int, Segment], int]:
    """The usable segments of a video by their number, and how many there are in the file."""
    try:
        duration, stamps, sentences = float(row["duration"]), list(row["timestamps"]), list(row["sentences"])
    except (KeyError, TypeError, ValueError):
        rows.leave(path, name, "not of the form {duration, timestamps, sentences}", read=1)
        return {}, 0
    if len(stamps) != len(sentences):
        count = len(sentences)
        rows.leave(path, name, f"texts without times: {count}, {len(stamps)} times", read=count)
        return {}, count
    found = {}
    for number, (stamp, sentence) in enumerate(zip(stamps, sentences, strict=True)):
        label = f"{name} segment {number}"
        try:
            start, end = (float(value) for value in stamp)
        except (TypeError, ValueError):
            start = end = math.nan
        if not 0 <= start < min(end, duration):
            rows.leave(path, label, f"times outside the video: {stamp} of 0..{duration:g} s", read=1)
            continue
        if texts := rows.texts([sentence], path, label):
            if end > duration:
                rows.note(path, label, "ends past the video's end; cut to it")
            found[number] = Segment(start, min(end, duration), texts[0])
    return found, len(stamps)
