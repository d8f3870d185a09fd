"""Data sets on a person's disk: which files make up a part under a protocol, found below one folder.

    loaded = load("msrvtt", "/data/msrvtt", "train", protocol="1k-A")

A split is (protocol, part). "official" is what the owners publish; the other protocols are those that
retrieval results are usually reported on. Names of files are those of their owners, in any sub-folder.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqlora.data.clips import Clip, Loaded, require_disjoint
from vqlora.data.formats.activitynet import load_activitynet
from vqlora.data.formats.jsonl import JSONL_FILE, load_jsonl, parts_of
from vqlora.data.formats.lsmdc import load_lsmdc
from vqlora.data.formats.msrvtt import MSRVTT_FILES, MSRVTT_LISTS, load_msrvtt
from vqlora.data.formats.vatex import load_vatex
from vqlora.data.rows import VIDEO_SUFFIXES, FormatError, Videos, walk
from vqlora.data.writers import ACTIVITYNET_FILES, LSMDC_FILES, VATEX_FILES
from vqlora.identity import digest, file_hash


@dataclass(frozen=True)
class Piece:
    """The files of one part. Of the alternatives in `files` one must be there whole; those in `also` are read
    where they are there; `ids` is the list of the part's clips, where it is not all of them."""

    files: tuple[tuple[str, ...], ...]
    also: tuple[str, ...] = ()
    ids: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set: who gives its files out, what its videos are called, its protocols, and its loader."""

    title: str
    origin: str
    videos: str
    protocols: Mapping[str, Mapping[str, Piece]]
    read: Callable[..., Loaded]


class Folder:
    """The annotation files below a folder by name, the one nearest to it first. Raises FormatError."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FormatError(f"{root}: no such folder; expected annotations and videos in it or below it")
        self._found: dict[str, list[Path]] = {}
        for path in walk(self.root):
            if not path.lower().endswith(VIDEO_SUFFIXES):
                self._found.setdefault(os.path.basename(path), []).append(Path(path))

    def find(self, name: str) -> Path | None:
        return min(self._found.get(name, []), key=lambda path: (len(path.parts), path), default=None)

    def files(self, piece: Piece) -> list[Path] | None:
        """The annotation files of a part; None where they are not there."""
        for names in piece.files:
            paths = [self.find(name) for name in names]
            if all(paths):
                return paths + [path for name in piece.also if (path := self.find(name))]
        return None


def load(format: str, root: str | Path, part: str, *, protocol: str = "official",
         task: str = "paragraph") -> Loaded:
    """One part of a data set below `root`; of format "jsonl" `root` may be the file itself.

    `task` is ActivityNet's: "paragraph" or "segments". Raises FormatError for an unknown format, protocol or
    part, and where a file is missing, naming it.
    """
    parts = pieces(format, protocol, root)
    if part not in parts:
        raise FormatError(f"{root}: {SOURCES[format].title}, {protocol}: no part {part!r}; "
                          f"allowed: {', '.join(parts)}")
    if format == "jsonl":
        return load_jsonl(Path(root), part=part)
    folder, piece = Folder(root), parts[part]
    files = folder.files(piece)
    lists = {name: folder.find(other.ids) for name, other in parts.items() if other.ids}
    if files is None or lists.get(part, root) is None:
        lacking = piece.ids if files else " or ".join(" with ".join(names) for names in piece.files)
        raise FormatError(f"{root}: {SOURCES[format].title}, {protocol}, part {part}: no {lacking} in it or "
                          f"below it; `vqlora data check {format} --root {root}` tells what goes where")
    lists = {name: path for name, path in lists.items() if path}
    return SOURCES[format].read(files, Videos(folder.root), part=part, protocol=protocol, task=task,
                                lists=lists)


def pieces(format: str, protocol: str, root: str | Path) -> Mapping[str, Piece]:
    """The parts of a protocol and their files. Raises FormatError naming what is allowed."""
    if format not in SOURCES:
        raise FormatError(f"format: {format!r} is not one of {', '.join(SOURCES)}")
    protocols = SOURCES[format].protocols
    if protocol not in protocols:
        raise FormatError(f"protocol: {protocol!r} is not one of {', '.join(protocols)} of {format}")
    if format == "jsonl":
        return {part: protocols[protocol]["train"] for part in parts_of(Path(root))}
    return protocols[protocol]


def check_run(settings: Any) -> None:
    """Raise FormatError where `settings.data` names a folder, protocol or part that is not there."""
    data, learns = settings.data, settings.arm != "frozen" and settings.steps
    if not Path(data.root).exists():
        raise FormatError(f"data.root: {data.root}: no such folder")
    for part in ("train", settings.eval_part) if learns else (settings.eval_part,):
        protocol = data.protocol if part == "train" else data.eval_protocol or data.protocol
        if part not in (parts := pieces(data.format, protocol, data.root)):
            allowed = ", ".join(parts)
            raise FormatError(f"data: {data.format}, {protocol}: no part {part!r}; allowed: {allowed}")


def load_of_run(data: Any, part: str) -> Loaded:
    """A part as a run's `data` settings name it: other protocols may hold for training and evaluation."""
    protocol = data.protocol if part == "train" else data.eval_protocol or data.protocol
    return load(data.format, data.root, part, protocol=protocol, task=data.task)


def refuse_overlap(data: Any, *parts: str) -> None:
    """Raise ValueError where a clip of training is in another part that the run reads, whole parts compared.

    MSR-VTT's 1k-A trains on 1,990 clips of the official test part: with `protocol: 1k-A` and `eval_protocol:
    official` a run would be scored on what it has learned.
    """
    train = load_of_run(data, "train").clips
    for part in dict.fromkeys(parts):
        names = f"train ({data.protocol})", f"{part} ({data.eval_protocol or data.protocol})"
        require_disjoint(**{names[0]: train, names[1]: load_of_run(data, part).clips})


def source_hash(root: str | Path) -> str:
    """Hash of the data below a folder: bytes of annotations, names and sizes of videos. Of a file, with its
    name: of all that lies beside it.

    Settings files do not count: editing one must not make another's runs anew.
    """
    whole = Path(root).is_dir()
    folder, rows = Path(root) if whole else Path(root).parent, [] if whole else [Path(root).name]
    for path in sorted(walk(folder)):
        if path.endswith((".yaml", ".yml")):
            continue
        text = path.endswith((".json", ".jsonl", ".csv", ".txt"))
        rows.append([os.path.relpath(path, folder), file_hash(path) if text else os.stat(path).st_size])
    return digest(rows)


def unknown_tokens(tokenizer: Any, clips: Iterable[Clip], language: str = "en") -> float:
    """Share of the captions' tokens that the tokenizer has no word for, 0 to 1."""
    texts = [text for clip in clips for text in clip.captions.get(language, ())]
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row] if texts else []
    return sum(i == tokenizer.unk_token_id for i in ids) / max(1, len(ids))


def _msrvtt(files, videos, *, part, protocol, lists, task) -> Loaded:
    return load_msrvtt(files, videos, part=part, protocol=protocol, lists=lists)


def _vatex(files, videos, *, part, protocol, lists, task) -> Loaded:
    return load_vatex(files, videos, part=part, ids=lists.get(part))


def _activitynet(files, videos, *, part, protocol, lists, task) -> Loaded:
    return load_activitynet(files, videos, part=part, task=task)


def _lsmdc(files, videos, *, part, protocol, lists, task) -> Loaded:
    return load_lsmdc(files, videos, part=part)


_ONE, _TRAIN_VAL, _TEST = MSRVTT_FILES
_EITHER = ((_ONE,), (_TRAIN_VAL, _TEST))
_ANET, _BOOK = ACTIVITYNET_FILES, LSMDC_FILES
SOURCES: dict[str, Source] = {
    "msrvtt": Source(
        title="MSR-VTT", read=_msrvtt, videos="video0.mp4 to video9999.mp4",
        origin="the MSR-VTT challenge; lists of 1k-A: msrvtt_data.zip of CLIP4Clip",
        protocols={
            "official": {"train": Piece(((_ONE,), (_TRAIN_VAL,))), "val": Piece(((_ONE,), (_TRAIN_VAL,))),
                         "test": Piece(((_ONE,), (_TEST,)))},
            **{protocol: {part: Piece(_EITHER, ids=name) for part, name in lists.items()}
               for protocol, lists in MSRVTT_LISTS.items()},
        }),
    "vatex": Source(
        title="VATEX", read=_vatex,
        videos="<videoID>.mp4, cut to the seconds in its name, or <YouTube id>.mp4, whole",
        origin="the VATEX website, videos from YouTube; lists of retrieval: the split of hgr_v2t",
        protocols={
            "official": {part: Piece(((VATEX_FILES[part],),)) for part in ("train", "val", "test")},
            "retrieval": {"train": Piece(((VATEX_FILES["train"],),)),
                          "val": Piece(((VATEX_FILES["val"],),), ids="val_list.txt"),
                          "test": Piece(((VATEX_FILES["val"],),), ids="test_list.txt")},
        }),
    "activitynet": Source(
        title="ActivityNet Captions", read=_activitynet, videos="v_<YouTube id>.mp4, or without v_",
        origin="captions.zip of its authors; videos: activity-net.org",
        protocols={
            "official": {"train": Piece((_ANET["train"],)),
                         "val": Piece((_ANET["val"][:1],), also=_ANET["val"][1:])},
            "retrieval": {"train": Piece((_ANET["train"],)), "test": Piece((_ANET["val"][:1],))},
        }),
    "lsmdc": Source(
        title="LSMDC", read=_lsmdc, videos="<film>/<clip id>.avi, or <film>.mkv, whole",
        origin="the describingmovies site, by permission of its owners",
        protocols={
            "official": {part: Piece(((_BOOK[part],),)) for part in ("train", "val", "test")},
            "1k": {"train": Piece(((_BOOK["train"],),)), "val": Piece(((_BOOK["val"],),)),
                   "test": Piece((("LSMDC16_challenge_1000_publictect.csv",),))},
        }),
    "jsonl": Source(
        title="Own captions", read=load_jsonl, videos="where the lines say, from the file's folder",
        origin="yourself; `vqlora data example` writes a pattern",
        protocols={"official": {"train": Piece(((JSONL_FILE,),))}}),
}
