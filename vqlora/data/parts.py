"""The clips of a run's parts with their frames: rendered data by domain, other data by `settings.data`."""

from __future__ import annotations

import importlib
from pathlib import Path

from vqlora.data.cache import FrameStore
from vqlora.data.formats.kinemoji import load_kinemoji


def clips_of(data_root: Path, settings, part: str, count: int, size: int | None = None):
    """(the first `count` clips of a part, their frames, number of annotation rows that could not be used).

    Where the settings ask for sound, the store of the frames has it. Frames of data that are not rendered are
    made squares of `size` pixels, what the base takes, unless the settings have another size. Raises
    ValueError where there are fewer clips.
    """
    own = settings.data
    if own is None:
        root, loaded = data_root / settings.domain, load_kinemoji(data_root, settings.domain, part)
    else:
        root, loaded = own.root, sources().load_of_run(own, part)
    if len(loaded.clips) < count:
        raise ValueError(f"{root}: {count} clips of part {part!r} asked for, {len(loaded.clips)} there")
    if own is None:  # the whole part: one cache for all runs
        store = FrameStore(loaded.clips, data_root / "cache", progress=False)
    else:
        kept = {"size": own.size or size, "fps": own.fps}
        store = FrameStore(loaded.clips[:count], data_root / "cache", progress=False, **kept)
    if settings.sound is not None:  # by name: runs without sound do not depend on it (`runs.SOUND_MODULES`)
        listen = importlib.import_module("vqlora.sound.store").sounds_of
        store.sounds = listen(loaded.clips[:count], store, settings.sound)
    return loaded.clips[:count], store, len(loaded.left_out)


def frame_size(config) -> int | None:
    """Pixels a side of the square frames that a base takes, by its config; None where it does not say."""
    for one in (config, getattr(config, "vision_config", None)):
        if isinstance(size := getattr(one, "image_size", None), int):
            return size
    return None


def refuse_overlap(settings) -> None:
    """Raise ValueError where whole parts of `settings.data` share clips; rendered parts cannot."""
    if settings.data is not None:
        others = (settings.eval_part, *(["val"] if settings.judge_clips else []))
        sources().refuse_overlap(settings.data, *others)



def sources():
    """`vqlora.data.sources`, by name: runs on rendered data do not depend on it (`runs.DATA_MODULES`)."""
    return importlib.import_module("vqlora.data.sources")
