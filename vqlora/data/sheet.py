"""The data sheet of loaded parts: how many texts were read, what was left out or mended, and why."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vqlora.data.clips import LeftOut, Loaded, reasons

COLUMNS = ("Data", "Part", "Texts read", "Clips", "Captions", "Left out", "Why", "Mended", "How")


def data_sheet(parts: Mapping[tuple[str, str], Loaded]) -> list[dict[str, Any]]:
    """A row per (data set, part) with the keys `COLUMNS`; `Why` and `How` are counts by reason.

    What is left out may be a text, a clip or a whole line, so that `Texts read` is no sum of the others. A
    row of the annotations that belongs to no part is counted with each.
    """
    rows = []
    for (name, part), loaded in parts.items():
        captions = sum(len(texts) for clip in loaded.clips for texts in clip.captions.values())
        rows.append({"Data": name, "Part": part, "Texts read": loaded.read, "Clips": len(loaded.clips),
                     "Captions": captions, "Left out": len(loaded.left_out), "Why": reasons(loaded.left_out),
                     "Mended": len(loaded.noted), "How": reasons(loaded.noted)})
    return rows


def markdown(sheet: Iterable[Mapping[str, Any]]) -> str:
    """The sheet as a table for README and terminals."""
    lines = ["| " + " | ".join(COLUMNS) + " |",
             "|---|---|---:|---:|---:|---:|---|---:|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row[key]) for key in COLUMNS) + " |"
                                for row in sheet)]) + "\n"


def missing_videos(loaded: Loaded) -> list[LeftOut]:
    """The rows that were left out because there is no file."""
    return [row for row in loaded.left_out if row.reason.startswith("no video file")]


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{count} {reason}" for reason, count in value.items())
    return str(value)
