"""Policies by name, one table for files, arrays, training and evaluation; each reads only what it goes by.

| policy | goes by | decodes |
|---|---|---|
| uniform, jittered, random, mixed | the number of frames (and chance) | nothing |
| keyframes | which frames the encoder stored whole | nothing |
| packets | bytes spent on each frame: equal steps of their sum, a fifth even in time | nothing |
| top-k | motion: the k largest | all |
| cumulative | motion: equal steps of its sum | all |
| cumulative-coverage | the same, a fifth of the sum even in time | all |
| lowbit-cumulative | the same with changes of the blocks' low-bit codes | all |
| lowbit-change | low-bit change against the last chosen frame | all |
| segments | stretches of change beyond the camera: the middle of each and what it led to, then more | all |
| own-segments | the same, without the shots that break into a scene which goes on after them | all |
| diverse | block means: farthest point | all |
| mmr | motion, against likeness of block means to those chosen | all |
| cover | the true events, where a data set has them: a reference that knows the answer | nothing |
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vqlora.data.clips import TrueEvent
from vqlora.frames import select
from vqlora.frames.container import Packets
from vqlora.frames.scores import FrameScores, packet_score
from vqlora.frames.shots import own_segments

COVERAGE = 0.2  # the share of time in the policies that have one


@dataclass(frozen=True)
class Footage:
    """A video as a policy sees it. `scores` and `packets` are called by the policies that go by them."""

    name: str
    n_frames: int
    scores: Callable[[], FrameScores]
    packets: Callable[[], Packets]
    events: Sequence[TrueEvent] | None = None


Policy = Callable[[Footage, int, np.random.Generator], np.ndarray]
"""(footage, k, random generator) -> min(k, n_frames) frame numbers, ascending."""


def _cover(footage: Footage, k: int, rng: np.random.Generator) -> np.ndarray:
    if footage.events is None:
        raise ValueError(f"{footage.name}: select 'cover' needs its true events, and this data set has none")
    return select.cover(footage.n_frames, k, footage.events)


BLIND: dict[str, Policy] = {
    "uniform": lambda footage, k, rng: select.uniform(footage.n_frames, k),
    "jittered": lambda footage, k, rng: select.jittered(footage.n_frames, k, rng),
    "random": lambda footage, k, rng: select.random_frames(footage.n_frames, k, rng),
    "mixed": lambda footage, k, rng: select.mixed(footage.n_frames, k, rng),
}
CHANCE = ("jittered", "random", "mixed")  # what these choose depends on the generator
BY_PACKETS: dict[str, Callable[[Packets, int], np.ndarray]] = {
    "keyframes": lambda table, k: select.key_frames(table.key, k),
    "packets": lambda table, k: select.cumulative(packets_score(table), k, COVERAGE),
}
BY_PIXELS: dict[str, tuple[Callable[[FrameScores, int], np.ndarray], str]] = {  # and the curve it goes by
    "top-k": (lambda s, k: select.top_k(s.motion, k), "motion"),
    "cumulative": (lambda s, k: select.cumulative(s.motion, k), "motion"),
    "cumulative-coverage": (lambda s, k: select.cumulative(s.motion, k, COVERAGE), "motion"),
    "lowbit-cumulative": (lambda s, k: select.cumulative(s.change, k, COVERAGE), "change"),
    "lowbit-change": (lambda s, k: select.low_bit_change(s.codes, k), "change"),
    "diverse": (lambda s, k: select.diverse(s.thumbs, k), "median_distance"),
    "segments": (lambda s, k: select.segments(s.moved, k), "local"),
    "own-segments": (lambda s, k: own_segments(s.thumbs, s.moved, k), "local"),
    "mmr": (lambda s, k: select.mmr(s.thumbs, s.motion, k), "motion"),
}
NAMES = (*BLIND, *BY_PACKETS, *BY_PIXELS, "cover")


def packets_score(table: Packets) -> np.ndarray:
    """`scores.packet_score` of a file's packet table, float64 `[T]`."""
    return packet_score(table.bytes, table.key, table.bidirectional)


def policy(name: str | Policy) -> Policy:
    """A policy by name (one of `NAMES`), or the given function. Raises ValueError."""
    if callable(name):
        return name
    if name in BLIND:
        return BLIND[name]
    if name in BY_PACKETS:
        return lambda footage, k, rng: BY_PACKETS[name](footage.packets(), k)
    if name in BY_PIXELS:
        return lambda footage, k, rng: BY_PIXELS[name][0](footage.scores(), k)
    if name == "cover":
        return _cover
    raise ValueError(f"select {name!r} is not one of {', '.join(NAMES)}")
