"""`vqlora data`: what a data set's folder must hold and does hold; and a small example of one's own data."""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqlora.data.clips import Loaded

EXAMPLES = """examples:
  vqlora data check msrvtt --root /data/msrvtt --protocol 1k-A
  vqlora data check vatex --root /data/vatex --json
  vqlora data check jsonl --root my_clips            my_clips/captions.jsonl, one object a line:
                          {"video": "clips/a.mp4", "captions": ["a dog runs"], "part": "train"}
  vqlora data example my_clips                       20 clips, captions.jsonl and run.yaml to begin with
exit codes: 0 usable, rows left out or not; 1 something is missing or broken; 2 a wrong option
"""
ABOUT = {
    "MSRVTT_data.json": "all videos with their split, and all sentences",
    "train_val_videodatainfo.json": "videos and sentences of train and validate",
    "test_videodatainfo.json": "videos and sentences of test",
    "MSRVTT_JSFUSION_test.csv": "the 1,000 test clips of 1k-A, a sentence each",
    "MSRVTT_train.9k.csv": "its 9,000 training clips",
    "MSRVTT_train.7k.csv": "its 7,010 training clips",
    "vatex_training_v1.0.json": "English and Chinese captions of train",
    "vatex_validation_v1.0.json": "English and Chinese captions of val",
    "vatex_public_test_english_v1.1.json": "English captions of test",
    "val_list.txt": "ids of those validation clips that are val, one a line",
    "test_list.txt": "ids of those validation clips that are test, one a line",
    "train.json": "timed sentences of train",
    "val_1.json": "timed sentences of val by the first writer",
    "val_2.json": "and by the second",
    "LSMDC16_annos_training.csv": "times and sentences of train",
    "LSMDC16_annos_val.csv": "times and sentences of val",
    "LSMDC16_annos_test.csv": "times and sentences of test",
    "LSMDC16_challenge_1000_publictect.csv": "the 1,000 test clips of retrieval",
    "captions.jsonl": "a line a clip: video, captions, maybe questions and part",
}
SHOWN = 3  # rows left out that are shown of each reason


def data_options(parser: argparse.ArgumentParser) -> None:
    """Add `check` and `example` to the parser of `vqlora data`."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    part = actions.add_parser("check", help="what must lie where, what is there, what is missing",
                              epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    part.add_argument("format", metavar="FORMAT", help="msrvtt, vatex, activitynet, lsmdc or jsonl")
    part.add_argument("--root", required=True, metavar="DIR", help="folder with annotations and videos")
    part.add_argument("--protocol", default="official", metavar="NAME", help="of splits (default: official)")
    part.add_argument("--task", default="paragraph", metavar="T", help="of activitynet: paragraph, segments")
    part.add_argument("--json", action="store_true", help="print JSON, with every row that was left out")
    part.set_defaults(command=_check)
    part = actions.add_parser("example", help="write clips, captions and settings of a first run")
    part.add_argument("folder", metavar="FOLDER", help="a new folder")
    part.add_argument("--clips", type=int, default=20, metavar="N", help="a fifth is val (default: 20)")
    part.add_argument("--seed", type=int, default=0, help="of the clips")
    part.set_defaults(command=_example)


def check(format: str, root: str | Path, protocol: str = "official", task: str = "paragraph") -> dict:
    """What `vqlora data check` prints as JSON; `usable` says whether every part can be read.

    Raises FormatError for an unknown format or protocol, or a folder that is not there.
    """
    from vqlora.data.clips import require_disjoint
    from vqlora.data.rows import FormatError, Videos
    from vqlora.data.sheet import data_sheet, missing_videos
    from vqlora.data.sources import SOURCES, load, pieces

    parts, loaded, faults = pieces(format, protocol, root), {}, {}
    files = _files(format, root, parts)
    for part in parts:
        try:
            loaded[part] = load(format, root, part, protocol=protocol, task=task)
        except FormatError as fault:
            faults[part] = str(fault)
    shared = None
    try:
        require_disjoint(**{part: found.clips for part, found in loaded.items()})
    except ValueError as fault:
        shared = str(fault)
    sheet = data_sheet({(format, part): found for part, found in loaded.items()})
    for row in sheet:
        row["No video"] = len(missing_videos(loaded[row["Part"]]))
    folder = Path(root) if Path(root).is_dir() else Path(root).parent
    return {
        "format": format, "title": SOURCES[format].title, "protocol": protocol, "root": str(root),
        "origin": SOURCES[format].origin,
        "files": files, "videos": {"names": SOURCES[format].videos, "found": len(Videos(folder))},
        "parts": sheet, "faults": faults, "shared": shared,
        "left_out": _rows(loaded, "left_out"), "mended": _rows(loaded, "noted"),
        "usable": not faults and shared is None and all(row["Clips"] for row in sheet),
    }


def _files(format: str, root: str | Path, parts: Any) -> list[dict[str, Any]]:
    """Each annotation file of the parts: its place or None, for what, and whether there is no way around."""
    from vqlora.data.sources import Folder

    if format == "jsonl":
        path = Path(root) / "captions.jsonl" if Path(root).is_dir() else Path(root)
        return [{"name": path.name, "what": ABOUT["captions.jsonl"], "path": str(path), "needed": True}]
    folder, named = Folder(root), {}
    for piece in parts.values():
        there = folder.files(piece)
        for names in piece.files:
            others = [" with ".join(other) for other in piece.files if other != names]
            for name in names:
                row = named.setdefault(name, {"or": others, "needed": False})
                row["needed"] |= there is None
        named |= {name: {"or": [], "needed": False} for name in piece.also if name not in named}
        if piece.ids:
            named[piece.ids] = {"or": [], "needed": folder.find(piece.ids) is None}
    rows = []
    for name, row in named.items():
        path = folder.find(name)
        rows.append({"name": name, "what": ABOUT[name], "path": str(path) if path else None, **row})
    return rows


def _rows(loaded: dict[str, Loaded], kind: str) -> list[dict[str, str]]:
    return [{"part": part, "source": row.source, "row": row.row, "reason": row.reason}
            for part, found in loaded.items() for row in getattr(found, kind)]


def describe(found: dict) -> str:
    """The same for people."""
    lines = [f"{found['title']}, protocol {found['protocol']}, in {found['root']}",
             f"from: {found['origin']}", "", "annotations, by these names, in the folder or below it:"]
    width = max(len(row["name"]) for row in found["files"])
    for row in found["files"]:
        state = "there" if row["path"] else "MISSING" if row["needed"] else "not there"
        instead = f" (or {' or '.join(row['or'])})" if row.get("or") else ""
        lines.append(f"  {state:9}  {row['name']:{width}}  {row['what']}{instead}")
    videos = found["videos"]
    lines += ["", f"videos, in the folder or below it: {videos['names']}",
              f"  {videos['found']} files there", ""]
    for row in found["parts"]:
        lines.append(f"{row['Part']}: {row['Clips']} clips with {row['Captions']} captions; "
                     f"{row['Left out']} rows left out, {row['No video']} of them clips without a file; "
                     f"{row['Mended']} mended")
    lines += [f"{part}: not usable: {fault}" for part, fault in found["faults"].items()]
    if found["shared"]:
        lines.append(f"parts overlap: {found['shared']}")
    for key, title in (("left_out", "left out"), ("mended", "mended and used")):
        lines += _by_reason(found[key], title)
    return "\n".join([*lines, "", "usable" if found["usable"] else "NOT usable as it is"])


def _by_reason(rows: list[dict[str, str]], title: str) -> list[str]:
    from vqlora.data.clips import LeftOut

    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        one = LeftOut(Path(row["source"]).name, row["row"], row["reason"])
        groups.setdefault(one.kind, {})[str(one)] = None
    lines = ["", f"{title}:"] if groups else []
    for kind, texts in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(texts)} {kind}")
        lines += [f"    {text}" for text in list(texts)[:SHOWN]]
        lines += [f"    ... ({len(texts) - SHOWN} more: --json)"] * (len(texts) > SHOWN)
    return lines


def _check(chosen: argparse.Namespace) -> int:
    found = check(chosen.format, chosen.root, chosen.protocol, chosen.task)
    print(json.dumps(found, indent=1, ensure_ascii=False) if chosen.json else describe(found))
    return 0 if found["usable"] else 1


def _example(chosen: argparse.Namespace) -> int:
    from vqlora.data.example import write_example

    folder = write_example(chosen.folder, chosen.clips, chosen.seed)
    print(f"{folder}: {chosen.clips} clips, captions.jsonl, run.yaml; next: vqlora run {folder}/run.yaml")
    return 0
