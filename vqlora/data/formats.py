"""Load MSR-VTT, VATEX, ActivityNet Captions, LSMDC and Kinemoji from the files their owners publish.

Every loader takes annotations, the folder with the videos (searched with its sub-folders) and a part, and
returns `Loaded`: the usable clips, and each row that was left out with the reason. A bad row costs that row;
a file that is missing or cannot be parsed, or a part that has no rows at all, raises `FormatError` in one
line. Parts are `train`, `val`, `devtest`, `test`; the files and split names behind them are the tables of
`vqlora.data.writers`.
"""
from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqlora.data.clips import LeftOut, Loaded, Question, Segment, TrueEvent
from vqlora.data.rows import FormatError, Rows, Videos, part_files, read_bytes, read_csv, read_json, read_text
from vqlora.data.writers import (  # noqa: F401  readers and writers of a format are found in one place
    ACTIVITYNET_FILES,
    LSMDC_FILES,
    MSRVTT_SPLITS,
    VATEX_FILES,
    write_activitynet,
    write_id_list,
    write_lsmdc,
    write_msrvtt,
    write_msrvtt_1ka,
    write_questions,
    write_truth,
    write_vatex,
)

MSRVTT_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
MSRVTT_LISTS = {
    "train": ("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv"), "test": ("MSRVTT_JSFUSION_test.csv",),
}
_MSRVTT = "MSR-VTT annotations: {info, videos: [...], sentences: [...]}"
_VATEX_NAME = re.compile(r"(.+)_(\d{6})_(\d{6})")
_LSMDC_NAME = re.compile(r"(.+)_(\d\d\.\d\d\.\d\d\.\d{3})-(\d\d\.\d\d\.\d\d\.\d{3})")
_QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the kinds MSRVTT-QA is reported by


def load_msrvtt(annotations: Path, videos: Path | Videos, *, part: str, protocol: str = "official",
                lists: Mapping[str, Path] | None = None, languages: Mapping[str, Path] | None = None,
                questions: Path | None = None) -> Loaded:
    """Read MSR-VTT.

    `annotations` is one JSON file, or the folder of `MSRVTT_data.json` or of the two `*_videodatainfo.json`.
    `protocol` "official" follows each video's `split` (train, validate, test; `devtest` is accepted too).
    "1k-A" follows id lists: `MSRVTT_JSFUSION_test.csv` (its one sentence per clip is the reference) and
    `MSRVTT_train.9k.csv` or `.7k.csv`, looked for beside the annotations or given as `lists={part: csv}`;
    lists that share a clip are refused. `languages` maps a language to a file of the same form with the
    captions in it; `questions` is an MSRVTT-QA file. `start time` and `end time` are places in the source:
    the published videos are cut already.
    """
    rows = Rows(part, videos)
    files = _msrvtt_files(Path(annotations))
    tables = [_msrvtt_table(path) for path in files]
    splits = _msrvtt_splits(files, tables, rows)
    if protocol == "official":
        source, wanted = files[0], {name: None for name, split in splits.items() if split == part}
        if not wanted:
            there = ", ".join(dict.fromkeys(splits.values())) or "none"
            raise FormatError(f"{source}: no clips of part {part!r}; parts there: {there}")
    elif protocol == "1k-A":
        source, wanted = _msrvtt_list(files[0].parent, lists or {}, rows)
    else:
        raise FormatError(f"MSR-VTT: protocol {protocol!r} is not one of 'official', '1k-A'")
    english: dict[str, list[str]] = {}
    for path, table in zip(files, tables, strict=True):
        _msrvtt_sentences(path, table, splits, wanted, rows, english)
    other: dict[str, dict[str, list[str]]] = {}
    for language, path in (languages or {}).items():
        _msrvtt_sentences(path, _msrvtt_table(path), splits, wanted, rows, other.setdefault(language, {}))
    for name, sentence in wanted.items():
        if name not in splits:
            rows.leave(source, name, "no such video in the annotations")
            continue
        captions = {"en": (sentence,) if sentence else tuple(english.get(name, ()))}
        rows.add(source, name, captions | {lang: tuple(table.get(name, ())) for lang, table in other.items()})
    loaded = rows.done(source)
    return attach_questions(loaded, questions) if questions else loaded


def load_vatex(annotations: Path, videos: Path | Videos, *, part: str) -> Loaded:
    """Read VATEX: `annotations` is its folder (`VATEX_FILES`) or the one file of this part.

    A clip's id is its `videoID`. Videos may be the cut clips (`<videoID>.mp4`) or whole ones (`<YouTube
    id>.mp4`); then the clip keeps `start_s` and `end_s` from its name.
    """
    rows = Rows(part, videos)
    (path,) = part_files(Path(annotations), {k: (v,) for k, v in VATEX_FILES.items()}, part, "VATEX")
    for number, row in enumerate(read_json(path, list, "VATEX annotations: [{videoID, enCap, chCap}]")):
        name = row.get("videoID") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            rows.leave(path, f"row {number}", "no videoID")
            continue
        captions = {language: rows.texts(row[key], path, name)
                    for language, key in (("en", "enCap"), ("zh", "chCap")) if row.get(key) is not None}
        match = _VATEX_NAME.fullmatch(name)
        span = (float(match[2]), float(match[3])) if match else None
        rows.add(path, name, captions, whole=match and match[1], span=span)
    return rows.done(path)


def load_activitynet(annotations: Path, videos: Path | Videos, *, part: str) -> Loaded:
    """Read ActivityNet Captions: `annotations` is its folder (`ACTIVITYNET_FILES`) or one file of this part.

    A clip's id is the key as published (`v_...`), `segments` are its timed sentences, and its reference
    captions are the paragraphs they form: two for validation clips that `val_2.json` describes as well, whose
    segments follow those of `val_1.json`. Segments that are reversed or start past the end are left out one
    by one; an end past the video's is cut to it.
    """
    rows = Rows(part, videos)
    files = part_files(Path(annotations), ACTIVITYNET_FILES, part, "ActivityNet Captions")
    segments: dict[str, list[Segment]] = {}
    paragraphs: dict[str, list[str]] = {}
    for path in files:
        table = read_json(path, dict, "ActivityNet Captions: {v_id: {duration, timestamps, sentences}}")
        for name, row in table.items():
            found = _segments(path, name, row, rows)
            segments.setdefault(name, []).extend(found)
            if found:
                paragraphs.setdefault(name, []).append(" ".join(s.text for s in found))
    for name, found in segments.items():
        rows.add(files[0], name, {"en": tuple(paragraphs.get(name, ()))}, stem=name.removeprefix("v_"),
                 segments=tuple(found))
    return rows.done(files[0])


def load_lsmdc(annotations: Path, videos: Path | Videos, *, part: str) -> Loaded:
    """Read LSMDC: `annotations` is its folder (`LSMDC_FILES`) or one file, e.g. the 1,000 retrieval clips.

    Tab-separated without a header: clip id, start and end aligned, start and end extracted, sentence. Several
    rows of one clip are its references. Videos lie in a folder per film or side by side, cut (`<clip
    id>.avi`) or whole (`<film>.mkv`; then the clip keeps the start and end in its id). SOMEONE stays as it
    is.
    """
    rows = Rows(part, videos)
    (path,) = part_files(Path(annotations), {k: (v,) for k, v in LSMDC_FILES.items()}, part, "LSMDC")
    captions: dict[str, list[str]] = {}
    data = read_bytes(path, "LSMDC annotations: six tab-separated columns").removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        cells = line.decode(errors="replace").rstrip("\r").split("\t")  # no quoting: quotes are part of texts
        if not line.strip():
            continue
        if len(cells) < 6 or not cells[0].strip():
            rows.leave(path, f"line {number}", f"{len(cells)} columns, 6 expected")
        elif "\ufffd" in cells[0]:
            rows.leave(path, f"line {number}", "clip id is not UTF-8")
        else:
            text = rows.texts([" ".join(cells[5:])], path, f"line {number}")
            captions.setdefault(cells[0].strip(), []).extend(text)
    for name, texts in captions.items():
        match = _LSMDC_NAME.fullmatch(name)
        span = (_clock_s(match[2]), _clock_s(match[3])) if match else None
        rows.add(path, name, {"en": tuple(texts)}, whole=match and match[1], span=span)
    return rows.done(path)


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
            name = _VATEX_NAME.sub(r"\1", clip.id)
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
    loaded, questions = Loaded(clips, loaded.left_out), notes / "questions.json"
    return attach_questions(loaded, questions) if questions.is_file() else loaded


def attach_questions(loaded: Loaded, path: Path) -> Loaded:
    """Add the questions of an MSRVTT-QA file (or ours, with `kind` and `choices`) to the clips it names.

    A number as `video_id` means `video<number>`. Without `choices` a question is open: its answer is the only
    one. Without `kind` the question word is. Rows of clips that are not in `loaded` belong to other parts.
    """
    questions: dict[str, list[Question]] = {clip.id: [] for clip in loaded.clips}
    left_out, seen = list(loaded.left_out), set()
    table = read_json(path, list, "MSRVTT-QA questions: [{id, video_id, question, answer}]")
    for number, row in enumerate(table):
        row = row if isinstance(row, dict) else {}
        video = row.get("video_id")
        name = f"video{video}" if isinstance(video, int) else video
        if name is not None and name not in questions:
            continue
        question, reason = _question(row)
        if name is None:
            reason = "no video_id"
        elif (label := row.get("id", f"row {number}")) in seen:
            reason = "question id used twice; the first is kept"
        if reason:
            left_out.append(LeftOut(str(path), f"question {row.get('id', f'row {number}')}", reason))
        else:
            seen.add(label)
            questions[name].append(question)
    clips = (dataclasses.replace(c, questions=c.questions + tuple(questions[c.id])) for c in loaded.clips)
    return Loaded(tuple(clips), tuple(left_out))


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


def _msrvtt_files(annotations: Path) -> list[Path]:
    if not annotations.is_dir():
        return [annotations]
    found = [annotations / name for name in MSRVTT_FILES if (annotations / name).is_file()]
    if not found:
        raise FormatError(f"{annotations}: no MSR-VTT annotations; expected {' or '.join(MSRVTT_FILES)}")
    return found[:1] if found[0].name == MSRVTT_FILES[0] else found


def _msrvtt_table(path: Path) -> dict[str, list[Any]]:
    table = read_json(path, dict, _MSRVTT)
    for key in ("videos", "sentences"):
        if not isinstance(table.get(key), list):
            raise FormatError(f"{path}: no list {key!r}; expected {_MSRVTT}")
    return table


def _msrvtt_splits(files: list[Path], tables: list[dict], rows: Rows) -> dict[str, str]:
    """Video id -> part, in the files' order."""
    parts = {split: part for part, split in MSRVTT_SPLITS.items()} | {"val": "val"}
    splits: dict[str, str] = {}
    for path, table in zip(files, tables, strict=True):
        for number, row in enumerate(table["videos"]):
            row = row if isinstance(row, dict) else {}
            name, split = row.get("video_id"), row.get("split")
            if not isinstance(name, str) or not name:
                rows.leave(path, f"video {number}", "no video_id")
            elif split not in parts:
                rows.leave(path, name, f"split {split!r} is not one of {', '.join(parts)}")
            elif name in splits:
                rows.leave(path, name, "video listed twice; the first is kept")
            else:
                splits[name] = parts[split]
    return splits


def _msrvtt_sentences(path: Path, table: dict, splits: Mapping[str, str], wanted: Mapping[str, Any],
                      rows: Rows, into: dict[str, list[str]]) -> None:
    seen = set()
    for number, row in enumerate(table["sentences"]):
        row = row if isinstance(row, dict) else {}
        name, label = row.get("video_id"), f"sentence {row.get('sen_id', f'row {number}')}"
        if name not in splits:
            rows.leave(path, label, f"no video {name!r} in the annotations")
        elif name in wanted:
            if "sen_id" in row and (name, row["sen_id"]) in seen:
                rows.leave(path, label, "sentence listed twice; the first is kept")
                continue
            seen.add((name, row.get("sen_id")))
            into.setdefault(name, []).extend(rows.texts([row.get("caption")], path, label))


def _msrvtt_list(folder: Path, lists: Mapping[str, Path], rows: Rows) -> tuple[Path, dict[str, str | None]]:
    """The id list of a part: its path, and video id -> its one sentence (or None: all sentences)."""
    paths = {part: Path(path) for part, path in lists.items()}
    for part, names in MSRVTT_LISTS.items():
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            paths.setdefault(part, found[0])
    if rows.part not in paths:
        names = " or ".join(MSRVTT_LISTS.get(rows.part, (f"lists={{{rows.part!r}: csv}}",)))
        raise FormatError(f"{folder}: MSR-VTT 1k-A has no list of part {rows.part!r} here; expected {names}")
    wanted: dict[str, str | None] = {}
    ids: dict[str, str] = {}
    for part, path in paths.items():
        for number, row in enumerate(read_csv(path, ("video_id",), "a CSV file with the column video_id"), 2):
            name = (row["video_id"] or "").strip()
            if ids.setdefault(name, part) != part:
                raise FormatError(f"{path}: {name} is in part {ids[name]!r} too; parts must be disjoint")
            if part != rows.part:
                continue
            if not name or (name in wanted):
                rows.leave(path, f"line {number}", "video listed twice" if name else "no video_id")
            elif "sentence" not in row:
                wanted[name] = None
            elif texts := rows.texts([row["sentence"]], path, name):
                wanted[name] = texts[0]
    return paths[rows.part], wanted


def _segments(path: Path, name: str, row: Any, rows: Rows) -> list[Segment]:
    try:
        duration, stamps, sentences = float(row["duration"]), list(row["timestamps"]), list(row["sentences"])
    except (KeyError, TypeError, ValueError):
        rows.leave(path, name, "not of the form {duration, timestamps, sentences}")
        return []
    if len(stamps) != len(sentences):
        rows.leave(path, name, f"{len(stamps)} timestamps for {len(sentences)} sentences")
        return []
    found = []
    for number, (stamp, sentence) in enumerate(zip(stamps, sentences, strict=True)):
        label = f"{name} segment {number}"
        try:
            start, end = (float(value) for value in stamp)
        except (TypeError, ValueError):
            start = end = math.nan
        if not 0 <= start < min(end, duration):
            rows.leave(path, label, f"times {stamp} are not inside 0..{duration:g} s")
        else:
            texts = rows.texts([sentence], path, label)
            found += [Segment(start, min(end, duration), text) for text in texts]
    return found


def _question(row: Mapping[str, Any]) -> tuple[Question | None, str | None]:
    """A question, or the reason why it is none."""
    text, answer = row.get("question"), row.get("answer")
    choices = row.get("choices", [answer])
    if not all(isinstance(value, str) and value.strip() for value in (text, answer)):
        return None, "question or answer is empty"
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return None, "choices are not a list of texts"
    if answer not in choices or len(set(choices)) < len(choices):
        return None, "the answer is not among the choices, or two choices are alike"
    word = text.split()[0].lower()
    kind = row.get("kind") or (word if word in _QUESTION_WORDS else "other")
    return Question(str(kind), text.strip(), tuple(choices), choices.index(answer)), None


def _clock_s(text: str) -> float:
    hours, minutes, seconds, milliseconds = (int(value) for value in text.split("."))
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
