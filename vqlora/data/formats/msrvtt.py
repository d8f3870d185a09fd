"""MSR-VTT: one JSON of videos and sentences (or two), official split by video, 1k-A by id lists."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqlora.data.clips import Loaded
from vqlora.data.formats.questions import attach_questions
from vqlora.data.rows import FormatError, Rows, Videos, read_json, read_table
from vqlora.data.writers import MSRVTT_SPLITS

MSRVTT_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
MSRVTT_LISTS = {
    "1k-A": {"train": "MSRVTT_train.9k.csv", "test": "MSRVTT_JSFUSION_test.csv"},
    "1k-A-7k": {"train": "MSRVTT_train.7k.csv", "test": "MSRVTT_JSFUSION_test.csv"},
}
_FORM = "MSR-VTT annotations: {info, videos: [...], sentences: [...]}"


def load_msrvtt(annotations: Path | Sequence[Path], videos: Path | Videos, *, part: str,
                protocol: str = "official", lists: Mapping[str, Path] | None = None,
                languages: Mapping[str, Path] | None = None, questions: Path | None = None) -> Loaded:
    """Read MSR-VTT.

    `annotations` is one JSON file, or both `*_videodatainfo.json`, or a folder that holds them. `protocol`
    "official" follows each video's `split` (train, validate, test; `devtest` is accepted too). "1k-A" and
    "1k-A-7k" follow id lists (`MSRVTT_LISTS`), looked for beside the annotations or given as `lists={part:
    csv}`: of training clips all sentences count, of others the one in the list. Lists that share a clip are
    refused. `languages` maps a language to a file of the same form with the captions in it; `questions` is
    an MSRVTT-QA file. `start time` and `end time` are places in the source: the published videos are cut.
    """
    rows = Rows(part, videos)
    files = _files(annotations)
    tables = [_table(path) for path in files]
    splits = _splits(files, tables, rows)
    if protocol == "official":
        source, wanted = files[0], {name: None for name, split in splits.items() if split == part}
        if not wanted:
            there = ", ".join(dict.fromkeys(splits.values())) or "none"
            raise FormatError(f"{source}: no clips of part {part!r}; parts there: {there}")
    elif protocol in MSRVTT_LISTS:
        source, wanted = _listed(files[0].parent, protocol, lists or {}, rows)
    else:
        allowed = ", ".join(map(repr, ("official", *MSRVTT_LISTS)))
        raise FormatError(f"MSR-VTT: protocol {protocol!r} is not one of {allowed}")
    english: dict[str, list[str]] = {}
    unlisted = {name for name, sentence in wanted.items() if sentence is None}
    for path, table in zip(files, tables, strict=True):
        _sentences(path, table, splits, unlisted, rows, english)
    other: dict[str, dict[str, list[str]]] = {}
    for language, path in (languages or {}).items():
        _sentences(path, _table(path), splits, wanted, rows, other.setdefault(language, {}))
    for name, sentence in wanted.items():
        if name not in splits:
            rows.leave(source, name, f"no such video: {name!r} is not in the annotations")
            continue
        captions = {"en": (sentence,) if sentence else tuple(english.get(name, ()))}
        rows.add(source, name, captions | {lang: tuple(table.get(name, ())) for lang, table in other.items()})
    loaded = rows.done(source)
    return attach_questions(loaded, questions) if questions else loaded


def _files(annotations: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(annotations, str | Path):
        return [Path(path) for path in annotations]
    folder = Path(annotations)
    if not folder.is_dir():
        return [folder]
    found = [folder / name for name in MSRVTT_FILES if (folder / name).is_file()]
    if not found:
        raise FormatError(f"{folder}: no MSR-VTT annotations; expected {' or '.join(MSRVTT_FILES)}")
    return found[:1] if found[0].name == MSRVTT_FILES[0] else found


def _table(path: Path) -> dict[str, list[Any]]:
    table = read_json(path, dict, _FORM)
    for key in ("videos", "sentences"):
        if not isinstance(table.get(key), list):
            raise FormatError(f"{path}: no list {key!r}; expected {_FORM}")
    return table


def _splits(files: list[Path], tables: list[dict], rows: Rows) -> dict[str, str]:
    """Video id -> part, in the files' order."""
    parts = {split: part for part, split in MSRVTT_SPLITS.items()} | {"val": "val"}
    splits: dict[str, str] = {}
    for path, table in zip(files, tables, strict=True):
        for number, row in enumerate(table["videos"]):
            row = row if isinstance(row, dict) else {}
            name, split = row.get("video_id"), row.get("split")
            if not isinstance(name, str) or not name:
                rows.leave(path, f"video {number}", "no video_id")
            elif not isinstance(split, str) or split not in parts:
                rows.leave(path, name, f"unknown split: {split!r} is not one of {', '.join(parts)}")
            elif name in splits:
                rows.leave(path, name, "video listed twice; the first is kept")
            else:
                splits[name] = parts[split]
    return splits


def _sentences(path: Path, table: dict, splits: Mapping[str, str], wanted: Collection[str], rows: Rows,
               into: dict[str, list[str]]) -> None:
    seen = set()
    for number, row in enumerate(table["sentences"]):
        row = row if isinstance(row, dict) else {}
        name, label = row.get("video_id"), f"sentence {row.get('sen_id', f'row {number}')}"
        if not isinstance(name, str) or name not in splits:
            rows.leave(path, label, f"no such video: {name!r} is not in the annotations")
        elif name in wanted:
            ident = (name, str(row.get("sen_id")))
            if "sen_id" in row and ident in seen:
                rows.leave(path, label, "sentence listed twice; the first is kept", read=1)
                continue
            seen.add(ident)
            into.setdefault(name, []).extend(rows.texts([row.get("caption")], path, label))


def _listed(folder: Path, protocol: str, lists: Mapping[str, Path],
            rows: Rows) -> tuple[Path, dict[str, str | None]]:
    """The id list of a part: its path, and video id -> its one sentence (or None: all sentences)."""
    usual = MSRVTT_LISTS[protocol]
    paths = {part: folder / name for part, name in usual.items() if (folder / name).is_file()}
    paths |= {part: Path(path) for part, path in lists.items()}
    if rows.part not in paths:
        expected = usual.get(rows.part, f"lists={{{rows.part!r}: csv}}")
        raise FormatError(f"{folder}: MSR-VTT {protocol} has no list of part {rows.part!r} here; "
                          f"expected {expected}")
    wanted: dict[str, str | None] = {}
    ids: dict[str, str] = {}
    for part, path in paths.items():
        for number, row, odd in read_table(path, ("video_id",), "a CSV file with the column video_id"):
            name = (row["video_id"] or "").strip()
            if name and ids.setdefault(name, part) != part:
                raise FormatError(f"{path}: {name} is in part {ids[name]!r} too; parts must be disjoint")
            if part != rows.part:
                continue
            if odd:
                rows.note(path, f"line {number}", odd)
            if not name or name in wanted:
                rows.leave(path, f"line {number}", "video listed twice" if name else "no video_id", read=1)
            elif part == "train" or "sentence" not in row:
                wanted[name] = None
            elif texts := rows.texts([row["sentence"]], path, name):
                wanted[name] = texts[0]
    return paths[rows.part], wanted
