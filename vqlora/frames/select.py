"""Which frames to look at: pure functions from a clip's length (and what is known of it) to frame numbers.

Every policy returns `min(k, n_frames)` distinct frame numbers in ascending order, as int64.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vqlora.data.clips import Clip, TrueEvent

Policy = Callable[[Clip, int, int, np.random.Generator], np.ndarray]
"""(clip, n_frames, k, random generator) -> frame numbers."""


def uniform(n_frames: int, k: int) -> np.ndarray:
    """The centres of k equal spans: `uniform(40, 4)` is 5, 15, 25, 35."""
    _checked(n_frames, k)
    if k >= n_frames:
        return np.arange(n_frames)
    return ((2 * np.arange(k) + 1) * n_frames) // (2 * k)


def jittered(n_frames: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame from each of k equal spans: uniform on average, and every frame gets its turn."""
    _checked(n_frames, k)
    if k >= n_frames:
        return np.arange(n_frames)
    edges = np.arange(k + 1) * n_frames // k
    return rng.integers(edges[:-1], edges[1:])


def cover(n_frames: int, k: int, events: Sequence[TrueEvent]) -> np.ndarray:
    """Frames that see every event: an upper reference that knows the truth.

    Each event gets the same number of frames, the first ones one more where k does not divide. One frame
    shows an event's middle, two its middle and what it led to, more are spread from just before it to just
    after it. Frames that coincide are replaced by those farthest from all chosen ones. With more events than
    k, the first k are seen; without events the choice is uniform.
    """
    _checked(n_frames, k)
    if k >= n_frames:
        return np.arange(n_frames)
    ordered = sorted(events, key=lambda event: (event.start, event.end))[:k]
    chosen: set[int] = set()
    for number, event in enumerate(ordered):
        share = k // len(ordered) + (number < k % len(ordered))
        middle = (event.start + event.end) // 2
        if share <= 2:
            spots = np.array([middle, event.end][:share])
        else:
            spots = np.rint(np.linspace(event.start - 1, event.end, share)).astype(int)
        chosen |= set(np.clip(spots, 0, n_frames - 1).tolist())
    if not chosen:
        return uniform(n_frames, k)
    while len(chosen) < k:
        distance = np.abs(np.arange(n_frames)[:, None] - np.array(sorted(chosen))).min(axis=1)
        chosen.add(int(distance.argmax()))
    return np.array(sorted(chosen), dtype=np.int64)


def mixed(n_frames: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Even, jittered or wholly random frames, a third of the time each: what any policy may choose."""
    _checked(n_frames, k)
    kind = rng.integers(3)
    if kind == 0 or k >= n_frames:
        return uniform(n_frames, k)
    if kind == 1:
        return jittered(n_frames, k, rng)
    return np.sort(rng.permutation(n_frames)[:k])


def policy(name: str | Policy) -> Policy:
    """A policy by name (uniform, jittered, mixed, cover), or the given function. Raises ValueError."""
    if callable(name):
        return name
    if name not in _POLICIES:
        raise ValueError(f"select {name!r} is not one of {', '.join(_POLICIES)}")
    return _POLICIES[name]


def _cover_clip(clip: Clip, n_frames: int, k: int, rng: np.random.Generator) -> np.ndarray:
    if clip.events is None:
        raise ValueError(f"clip {clip.id}: select 'cover' needs its true events, and this data set has none")
    return cover(n_frames, k, clip.events)


_POLICIES: dict[str, Policy] = {
    "uniform": lambda clip, n_frames, k, rng: uniform(n_frames, k),
    "jittered": lambda clip, n_frames, k, rng: jittered(n_frames, k, rng),
    "mixed": lambda clip, n_frames, k, rng: mixed(n_frames, k, rng),
    "cover": _cover_clip,
}


def _checked(n_frames: int, k: int) -> None:
    if n_frames < 1 or k < 1:
        raise ValueError(f"cannot choose {k} of {n_frames} frames; both must be at least 1")
