"""VATEX: English and Chinese captions; a clip's name holds its stretch of the source video."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vqlora.data.clips import Loaded
from vqlora.data.rows import Rows, Videos, part_files, read_json
from vqlora.data.writers import VATEX_FILES

VATEX_NAME = re.compile(r"(.+)_(\d{6})_(\d{6})")


def load_vatex(annotations: Path | Sequence[Path], videos: Path | Videos, *, part: str,
               ids: Path | None = None) -> Loaded:
    """Read VATEX: `annotations` is its folder (`VATEX_FILES`), the one file of this part, or several files.

    A clip's id is its `videoID`. Videos may be the cut clips (`<videoID>.mp4`) or whole ones (`<YouTube
    id>.mp4`); then the clip keeps `start_s` and `end_s` from its name. `ids` is a list of the clips to take:
    retrieval is reported on halves of the validation clips.
    """
    rows = Rows(part, videos, ids)
    files = part_files(annotations, {k: (v,) for k, v in VATEX_FILES.items()}, part, "VATEX")
    for path in files:
        for number, row in enumerate(read_json(path, list, "VATEX annotations: [{videoID, enCap, chCap}]")):
            name = row.get("videoID") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name:
                rows.leave(path, f"row {number}", "no videoID", read=1)
                continue
            if not rows.wants(name):
                continue
            captions = {language: rows.texts(row[key], path, name)
                        for language, key in (("en", "enCap"), ("zh", "chCap")) if row.get(key) is not None}
            match = VATEX_NAME.fullmatch(name)
            span = (float(match[2]), float(match[3])) if match else None
            rows.add(path, name, captions, whole=match and match[1], span=span)
    return rows.done(files[0])
