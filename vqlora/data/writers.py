"""Write clips in the published annotation formats of MSR-VTT, VATEX, ActivityNet Captions and LSMDC.

The files are what the owners of those data sets publish, so the loaders of `vqlora.data.formats` read both.
Where a data set has no name for a part (`devtest` everywhere, ActivityNet's `test`), ours is added in the
owner's pattern: see `MSRVTT_SPLITS`, `VATEX_FILES`, `ACTIVITYNET_FILES`, `LSMDC_FILES`. Writers are
deterministic (same clips, same bytes), keep the order given, and replace the target file at once, so a reader
never sees half a file. `durations_s` is the length of each clip in seconds: one number, or a mapping by id.
"""
from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vqlora.data.clips import PARTS, Clip, Segment
from vqlora.files import write_atomic

MSRVTT_SPLITS = {"train": "train", "val": "validate", "devtest": "devtest", "test": "test"}
VATEX_FILES = {
    "train": "vatex_training_v1.0.json", "val": "vatex_validation_v1.0.json",
    "devtest": "vatex_devtest.json", "test": "vatex_public_test_english_v1.1.json",
}
ACTIVITYNET_FILES = {
    "train": ("train.json",), "val": ("val_1.json", "val_2.json"),
    "devtest": ("devtest.json",), "test": ("test.json",),
}
LSMDC_FILES = {
    "train": "LSMDC16_annos_training.csv", "val": "LSMDC16_annos_val.csv",
    "devtest": "LSMDC16_annos_devtest.csv", "test": "LSMDC16_annos_test.csv",
}
Durations = float | Mapping[str, float]


def write_msrvtt(path: Path, clips: Iterable[Clip], *, durations_s: Durations, language: str = "en",
                 info: Mapping[str, Any] | None = None) -> Path:
    """Write one file like `MSRVTT_data.json`: `info`, `videos`, `sentences`; all parts in one, by `split`.

    Clips without a caption in `language` are listed under `videos` and have no sentence.
    """
    videos, sentences = [], []
    for number, clip in enumerate(clips):
        videos.append({
            "category": 0, "url": "", "video_id": clip.id, "start time": 0.0,
            "end time": _duration_s(durations_s, clip.id), "split": MSRVTT_SPLITS[clip.part], "id": number,
        })
        for caption in clip.captions.get(language, ()):
            sentences.append({"caption": caption, "video_id": clip.id, "sen_id": len(sentences)})
    content = {"info": dict(info or {}), "videos": videos, "sentences": sentences}
    return write_atomic(path, json_lines(content))


def write_msrvtt_1ka(path: Path, clips: Iterable[Clip], *, language: str = "en") -> Path:
    """Write the 1k-A list (`key,vid_key,video_id,sentence`): one row per clip, with its first caption."""
    rows = [(f"ret{n}", f"msr{clip.id.removeprefix('video')}", clip.id, clip.captions[language][0])
            for n, clip in enumerate(clips)]
    return _write_csv(path, ("key", "vid_key", "video_id", "sentence"), rows)


def write_id_list(path: Path, ids: Iterable[str]) -> Path:
    """Write a one-column list of clips like `MSRVTT_train.9k.csv`."""
    return _write_csv(path, ("video_id",), [(name,) for name in ids])


def write_vatex(folder: Path, clips: Iterable[Clip], *, durations_s: Durations) -> dict[str, Path]:
    """Write one list per part (`VATEX_FILES`): `videoID` (`<id>_000000_<end>`, seconds), `enCap`, `chCap`.

    Returns part -> path. `chCap` holds captions["zh"] and is left away where no clip of the part has any, as
    in the published test file.
    """
    paths = {}
    for part, group in _by_part(clips).items():
        chinese = any(clip.captions.get("zh") for clip in group)
        rows = []
        for clip in group:
            row = {"videoID": f"{clip.id}_000000_{math.ceil(_duration_s(durations_s, clip.id)):06d}",
                   "enCap": list(clip.captions.get("en", ()))}
            rows.append(row | {"chCap": list(clip.captions.get("zh", ()))} if chinese else row)
        paths[part] = write_atomic(Path(folder) / VATEX_FILES[part], json_lines(rows))
    return paths


def write_activitynet(folder: Path, clips: Iterable[Clip], *, durations_s: Durations,
                      second: Mapping[str, Sequence[Segment]] | None = None) -> dict[str, Path]:
    """Write `{v_<id>: {duration, timestamps, sentences}}` per part (`ACTIVITYNET_FILES`).

    The rows are `clip.segments`; `second` gives the second annotator's by clip id (`val_2.json`, validation
    clips only). Returns part -> first path.
    """
    def body(rows: Iterable[tuple[str, Sequence[Segment]]]) -> str:
        return json_lines({f"v_{name}": {
            "duration": _duration_s(durations_s, name),
            "timestamps": [[s.start_s, s.end_s] for s in segments],
            "sentences": [s.text for s in segments],
        } for name, segments in rows})

    paths = {}
    for part, group in _by_part(clips).items():
        files = ACTIVITYNET_FILES[part]
        paths[part] = write_atomic(Path(folder) / files[0], body((clip.id, clip.segments) for clip in group))
        if len(files) > 1 and second:
            write_atomic(Path(folder) / files[1],
                         body((clip.id, second[clip.id]) for clip in group if clip.id in second))
    return paths


def write_lsmdc(folder: Path, clips: Iterable[Clip], *, durations_s: Durations,
                sentences: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Write tab-separated rows without header per part (`LSMDC_FILES`), one sentence a clip.

    Columns: clip id (`<id>_<start>-<end>`), start and end aligned, start and end extracted, sentence.
    `sentences` replaces the first English caption by clip id (LSMDC says SOMEONE for every character's name).
    Returns part -> path.
    """
    paths = {}
    for part, group in _by_part(clips).items():
        lines = []
        for clip in group:
            start, end = _timestamp(0.0), _timestamp(_duration_s(durations_s, clip.id))
            text = (sentences or {}).get(clip.id) or clip.captions["en"][0]
            name, text = f"{clip.id}_{start}-{end}", " ".join(text.split())
            lines.append("\t".join([name, start, end, start, end, text]))
        paths[part] = write_atomic(Path(folder) / LSMDC_FILES[part], "\n".join(lines) + "\n")
    return paths


def write_questions(path: Path, clips: Iterable[Clip]) -> Path:
    """Write MSRVTT-QA rows (`id`, `video_id`, `category_id`, `question`, `answer`) plus `kind`, `choices`."""
    rows: list[dict[str, Any]] = []
    for clip in clips:
        for q in clip.questions:
            rows.append({"id": len(rows), "video_id": clip.id, "category_id": 0, "question": q.text,
                         "answer": q.choices[q.answer], "kind": q.kind, "choices": list(q.choices)})
    return write_atomic(path, json_lines(rows))


def write_jsonl(path: Path, clips: Iterable[Clip], *, language: str = "en") -> Path:
    """Write one's own format: `video` (a path from the file's folder), `captions`, `questions`, `part`."""
    lines = []
    for clip in clips:
        row: dict[str, Any] = {"video": Path(clip.path).relative_to(Path(path).parent).as_posix()}
        row["captions"] = list(clip.captions.get(language, ()))
        if clip.questions:
            row["questions"] = [{"question": q.text, "answer": q.choices[q.answer], "kind": q.kind,
                                 "choices": list(q.choices)} for q in clip.questions]
        lines.append(_dump(row | {"part": clip.part}))
    return write_atomic(path, "\n".join(lines) + "\n")


def write_truth(path: Path, clips: Iterable[Clip],
                extra: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write a JSON object a line: `video_id`, `events` (name, motion, start, end in frames), `**extra[id]`.

    Loaders read `events` and ignore the rest.
    """
    lines = []
    for clip in clips:
        events = [asdict(event) for event in clip.events or ()]
        lines.append(_dump({"video_id": clip.id, "events": events, **(extra or {}).get(clip.id, {})}))
    return write_atomic(path, "\n".join(lines) + "\n")


def json_lines(value: dict | list) -> str:
    """JSON with one row of data a line (also in an object's lists), so that a diff shows rows."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(_dump, value)) + "\n]\n"
    items = []
    for key, item in value.items():
        rows = isinstance(item, list) and item
        text = "[\n" + ",\n".join(map(_dump, item)) + "\n]" if rows else _dump(item)
        items.append(f"{_dump(key)}: {text}")
    return "{\n" + ",\n".join(items) + "\n}\n"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return write_atomic(path, buffer.getvalue())


def _by_part(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.part, []).append(clip)
    return {part: groups[part] for part in PARTS if part in groups}


def _duration_s(durations_s: Durations, clip_id: str) -> float:
    return float(durations_s[clip_id] if isinstance(durations_s, Mapping) else durations_s)


def _timestamp(seconds: float) -> str:
    """LSMDC's HH.MM.SS.mmm."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}.{ms // 60_000 % 60:02d}.{ms // 1000 % 60:02d}.{ms % 1000:03d}"
