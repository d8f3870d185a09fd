"""The comparisons of notebook 14: their bases, made where they are not named, and their runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vqlora.config import RunSettings
from vqlora.data.cache import FrameStore
from vqlora.data.formats.kinemoji import load_kinemoji
from vqlora.experiments import HubSettings
from vqlora.hub import small

EXPERIMENT = "14_checkpoints"


def base_of(compared: HubSettings, build: Path, *, decoder: Callable[[], tuple] = small.smollm2) -> str:
    """The checkpoint that a comparison starts from: named, or made below `build` unless it is there."""
    if compared.base is not None:
        return compared.base
    asked, data = compared.align, build / "data"
    clips = load_kinemoji(data, asked.domain, "train").clips[: asked.clips]
    store = FrameStore(clips, data / "cache", progress=False)
    folder = build / "base" / "small"
    return str(small.make_small_base(folder, asked, clips, store, data / "cache", decoder=decoder))


def runs_of(compared: HubSettings, base: str, card: str | None = None) -> tuple[RunSettings, ...]:
    """Settings of every run, as they fit the card."""
    return compared.on(card).runs(base=base, experiment=EXPERIMENT)
