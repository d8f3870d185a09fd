"""Kinemoji, the rendered benchmark: written in the published formats, read by the same loaders."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vqlora.data.clips import Loaded, TrueEvent
from vqlora.data.formats.activitynet import load_activitynet
from vqlora.data.formats.msrvtt import load_msrvtt
from vqlora.data.formats.questions import attach_questions
from vqlora.data.formats.vatex import VATEX_NAME, load_vatex
from vqlora.data.rows import FormatError, Videos, read_text
from vqlora.data.writers import ACTIVITYNET_FILES, VATEX_FILES


def load_kinemoji(root: Path, domain: str, part: str) -> Loaded:
    """Read one part of a Kinemoji domain from `root/<domain>/`.

    annotations/msrvtt.json (English), annotations/msrvtt.<language>.json (further languages),
    annotations/vatex/ (its `chCap` is Chinese), annotations/activitynet/ (segments),
    annotations/questions.json and annotations/truth.jsonl; all but the first may be absent. Videos:
    videos/**/<id>.mp4.
    """
    folder = Path(root) / domain
    notes = folder / "annotations"
    if not notes.is_dir():
        there = ", ".join(sorted(p.parent.name for p in Path(root).glob("*/annotations"))) or "none"
        raise FormatError(f"{root}: no domain {domain!r} (folder {domain}/annotations); there: {there}")
    videos = Videos(folder / "videos")
    languages = {path.suffixes[-2][1:]: path for path in sorted(notes.glob("msrvtt.*.json"))}
    loaded = load_msrvtt(notes / "msrvtt.json", videos, part=part, languages=languages)
    more: dict[str, dict[str, Any]] = {clip.id: {} for clip in loaded.clips}
    captions = {clip.id: clip.captions for clip in loaded.clips}
    if (notes / "vatex" / VATEX_FILES[part]).is_file():
        for clip in load_vatex(notes / "vatex", videos, part=part).clips:
            name = VATEX_NAME.sub(r"\1", clip.id)
            if name in more and clip.captions.get("zh"):
                more[name]["captions"] = {**captions[name], "zh": clip.captions["zh"]}
    if (notes / "activitynet" / ACTIVITYNET_FILES[part][0]).is_file():
        for clip in load_activitynet(notes / "activitynet", videos, part=part).clips:
            if (name := clip.id.removeprefix("v_")) in more:
                more[name]["segments"] = clip.segments
    if (notes / "truth.jsonl").is_file():
        for name, events in read_truth(notes / "truth.jsonl").items():
            if name in more:
                more[name]["events"] = events
    clips = tuple(dataclasses.replace(clip, **more[clip.id]) for clip in loaded.clips)
    loaded, questions = dataclasses.replace(loaded, clips=clips), notes / "questions.json"
    return attach_questions(loaded, questions) if questions.is_file() else loaded


def read_truth(path: Path) -> dict[str, tuple[TrueEvent, ...]]:
    """Read `write_truth`'s lines: clip id -> what really happens. Raises FormatError naming the line."""
    expected = "a JSON object a line: {video_id, events: [{name, motion, start, end}]}"
    truth = {}
    for number, line in enumerate(read_text(path, expected).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            truth[row["video_id"]] = tuple(
                TrueEvent(e["name"], e["motion"], int(e["start"]), int(e["end"])) for e in row["events"])
        except (ValueError, KeyError, TypeError):
            raise FormatError(f"{path}: line {number} is broken; expected {expected}") from None
    return truth
