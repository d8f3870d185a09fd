"""The sound of all clips of a part, decoded once: windows by clip, in a file beside the part's frames."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip
from vqlora.identity import code_hash
from vqlora.sound.bands import band_energies
from vqlora.sound.track import read_track

SOUNDS = ("own", "other")


def sounds_of(clips: Sequence[Clip], store: FrameStore, whose: str = "own") -> Mapping[str, np.ndarray]:
    """By clip id, float32 `[windows, bands]` (`band_energies`) of those `clips` that are in `store`.

    whose: "own", or "other" for the sound of the next of the clips, the first one's for the last: as a
    control, in which a clip's sound is as likely as ever and tells nothing of it. Raises ValueError for
    another word, or where there is no other clip.
    """
    if whose not in SOUNDS:
        raise ValueError(f"sound: {whose!r} is not known; allowed: {', '.join(SOUNDS)}")
    windows = _windows(store)
    ids = [clip.id for clip in clips if clip.id in windows]
    if whose == "own":
        return {name: windows[name] for name in ids}
    if len(ids) < 2:
        raise ValueError(f"sound: 'other' needs two clips at least, got {len(ids)}")
    return {name: windows[other] for name, other in zip(ids, ids[1:] + ids[:1], strict=True)}


def _windows(store: FrameStore) -> dict[str, np.ndarray]:
    """Of every clip of the store, from the file that this code wrote, or decoded now and kept.

    The store's own name is a hash of the files' bytes.
    """
    code = code_hash(["vqlora.sound.bands", "vqlora.sound.track"])
    path = store.path.with_name(f"{store.path.name}-{code}.npy")
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            found = [band_energies(read_track(Path(c.path), c.start_s, c.end_s)) for c in store.clips]
            part = path.with_suffix(".part.npy")
            np.save(part, np.stack(found))
            os.replace(part, path)
    return dict(zip((clip.id for clip in store.clips), np.load(path), strict=True))
