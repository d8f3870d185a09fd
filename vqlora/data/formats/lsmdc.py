"""LSMDC: tab-separated lines without a header, one sentence a line; a clip's name holds its times."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vqlora.data.clips import Loaded
from vqlora.data.rows import FormatError, Rows, Videos, part_files, read_bytes
from vqlora.data.writers import LSMDC_FILES

_NAME = re.compile(r"(.+)_(\d\d\.\d\d\.\d\d\.\d{3})-(\d\d\.\d\d\.\d\d\.\d{3})")
_FORM = "LSMDC annotations: six tab-separated columns"


def load_lsmdc(annotations: Path | Sequence[Path], videos: Path | Videos, *, part: str,
               ids: Path | None = None) -> Loaded:
    """Read LSMDC: `annotations` is its folder (`LSMDC_FILES`) or one file, e.g. the 1,000 retrieval clips.

    Tab-separated without a header: clip id, start and end aligned, start and end extracted, sentence. Several
    rows of one clip are its references. Videos lie in a folder per film or side by side, cut (`<clip
    id>.avi`) or whole (`<film>.mkv`; then the clip keeps the start and end in its id). SOMEONE stays as it
    is. A tab inside the sentence, quotes around the line and bytes of Windows-1252 are mended and noted.
    """
    rows = Rows(part, videos, ids)
    files = part_files(annotations, {k: (v,) for k, v in LSMDC_FILES.items()}, part, "LSMDC")
    captions: dict[str, tuple[Path, list[str]]] = {}
    for path in files:
        _read(path, captions, rows)
    for name, (path, texts) in captions.items():
        match = _NAME.fullmatch(name)
        span = (_clock_s(match[2]), _clock_s(match[3])) if match else None
        rows.add(path, name, {"en": tuple(texts)}, whole=match and match[1], span=span)
    return rows.done(files[0])


def _read(path: Path, captions: dict[str, tuple[Path, list[str]]], rows: Rows) -> None:
    data = read_bytes(path, _FORM).removeprefix(b"\xef\xbb\xbf")
    short, good = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        label, odd = f"line {number}", []
        if not line.strip():
            continue
        text, mended = _decoded(line.rstrip(b"\r"))
        odd += ["not UTF-8; read as Windows-1252"] * mended
        if text.startswith('"'):  # a spreadsheet's doing; quotes elsewhere are part of texts
            text = text[1:-1].replace('""', '"') if text.endswith('"') else text[1:]
            odd.append("quotes around the line removed")
        cells = text.split("\t")
        name = cells[0].strip()
        if len(cells) < 6 or not name:
            short.append((number, f"{len(cells)} columns", cells))
            reason = f"wrong columns: {len(cells)}, 6 expected" if name else "no clip id"
            rows.leave(path, label, reason, read=1)
            continue
        good += 1
        if not rows.wants(name):
            continue
        if not name.isascii():
            rows.leave(path, label, "clip id is not ASCII", read=1)
            continue
        odd += ["tab in the sentence"] * (len(cells) > 6 and bool("".join(cells[6:]).strip()))
        for reason in odd:
            rows.note(path, label, reason)
        _, texts = captions.setdefault(name, (path, []))
        texts.extend(rows.texts([" ".join(cells[5:])], path, label))
    if short and not good:
        number, reason, cells = short[0]
        raise FormatError(f"{path}: line {number}: {reason}: {cells[0][:60]!r}; expected {_FORM}")


def _decoded(line: bytes) -> tuple[str, bool]:
    try:
        return line.decode("utf-8"), False
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace"), True


def _clock_s(text: str) -> float:
    hours, minutes, seconds, milliseconds = (int(value) for value in text.split("."))
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
