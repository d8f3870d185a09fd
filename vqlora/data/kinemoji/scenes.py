"""A clip before it is drawn: who is where, what they do and when. Pure functions of (domain, part, index,
seed)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from .domains import DIRECTIONS, LASTING, MOTIONS, PASSING, Domain, allowed

__all__ = [
    "CELLS",
    "DIRECTIONS",
    "LASTING",
    "MOTIONS",
    "PASSING",
    "Actor",
    "Event",
    "Scene",
    "Shot",
    "sample_scene",
]

CELLS = ("top left", "top right", "bottom left", "bottom right")
PARTS = ("train", "val", "devtest", "test")


@dataclass(frozen=True)
class Event:
    """Actor number ``actor`` makes ``motion`` during frames ``[start, end)``."""

    actor: int
    motion: str
    start: int
    end: int


@dataclass(frozen=True)
class Actor:
    """A sprite in one of four cells of one shot; ``size`` in pixels; unmentioned actors are grey movers."""

    sprite: int
    cell: int
    size: int
    shot: int
    x: float
    y: float
    mentioned: bool = True


@dataclass(frozen=True)
class Shot:
    """Frames ``[start, end)`` over one background."""

    start: int
    end: int
    background: str
    background_seed: int


@dataclass(frozen=True)
class Scene:
    """One clip. ``inserted`` and ``degraded`` list frame numbers; ``aside`` is the sprite of a cutaway, or
    None."""

    domain: str
    part: str
    index: int
    frames: int
    actors: tuple[Actor, ...]
    events: tuple[Event, ...]
    shots: tuple[Shot, ...]
    inserted: tuple[int, ...]
    degraded: tuple[int, ...]
    aside: int | None
    seed: int

    @property
    def id(self) -> str:
        return f"{self.domain}-{self.part}-{self.index:05d}"


def scene_seed(domain: str, part: str, index: int, seed: int) -> int:
    """A 64-bit seed that no other scene shares."""
    entropy = [seed, zlib.crc32(domain.encode()), zlib.crc32(part.encode()), index]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def sample_scene(domain: Domain, part: str, index: int, seed: int) -> Scene:
    """Draw the script of one clip. The same arguments give the same scene, on any machine."""
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown; allowed: {', '.join(PARTS)}")
    clip_seed = scene_seed(domain.scenes or domain.name, part, index, seed)
    rng = np.random.default_rng(clip_seed)
    shots = _shots(domain, rng)
    n_events = int(rng.integers(1, 4))
    windows = _windows(domain, n_events, shots, rng)
    actors, events = _cast(domain, windows, len(shots), rng)
    inserted, aside = _inserts(domain, events, actors, rng)
    degraded = _degraded(domain, events, rng)
    return Scene(
        domain.name, part, index, domain.frames, actors, events, shots, inserted, degraded, aside, clip_seed
    )


def _shots(domain: Domain, rng: np.random.Generator) -> tuple[Shot, ...]:
    bounds = [0, domain.frames]
    if rng.random() < domain.cut_share:
        bounds.insert(1, int(rng.integers(domain.frames * 2 // 5, domain.frames * 3 // 5 + 1)))
    return tuple(
        Shot(start, end, str(rng.choice(domain.backgrounds)), int(rng.integers(2**31)))
        for start, end in zip(bounds, bounds[1:], strict=False)
    )


def _windows(domain, n_events, shots, rng) -> list[tuple[int, int, int]]:
    """Disjoint (start, end, shot), sorted, each inside its shot, at least one still frame between two of
    them."""
    low, high = domain.event_frames
    while True:
        lengths = rng.integers(low, high + 1, size=n_events)
        starts = np.sort(rng.integers(1, domain.frames - low, size=n_events))
        windows = []
        for start, length in zip(starts, lengths, strict=True):
            shot = next(i for i, s in enumerate(shots) if s.start <= start < s.end)
            windows.append((int(start), int(start + length), shot))
        inside = all(s > shots[k].start and e < shots[k].end for s, e, k in windows)
        apart = all(a[1] < b[0] for a, b in zip(windows, windows[1:], strict=False))
        if inside and apart:
            return windows


def _cast(domain, windows, n_shots, rng) -> tuple[tuple[Actor, ...], tuple[Event, ...]]:
    """One actor for each event, still ones to fill up (a shot holds 1 to 4), grey movers where the domain
    has them."""
    sprites = [int(s) for s in rng.permutation(domain.sprites)]
    actors: list[Actor] = []
    events: list[Event] = []
    cells: dict[int, list[int]] = {}

    def place(sprite: int, shot: int, mentioned: bool = True) -> None:
        free = cells.setdefault(shot, [int(c) for c in rng.permutation(4)])
        cell = free.pop() if mentioned else int(rng.integers(4))
        size = int(rng.integers(21, 28)) if mentioned else int(rng.integers(12, 15))
        x, y = (16 + 32 * (cell % 2) + rng.uniform(-4, 4), 16 + 32 * (cell // 2) + rng.uniform(-4, 4))
        actors.append(Actor(sprite, cell, size, shot, round(float(x), 2), round(float(y), 2), mentioned))

    for start, end, shot in windows:
        motion = str(rng.choice(MOTIONS))
        sprite = next(s for s in sprites if allowed(domain, s, motion))
        sprites.remove(sprite)
        place(sprite, shot)
        events.append(Event(len(actors) - 1, motion, start, end))
    used = {shot for _, _, shot in windows}
    for shot in range(n_shots):
        still = int(rng.integers(0 if shot in used else 1, 3))
        for _ in range(min(still, 3 - len([a for a in actors if a.shot == shot]))):
            place(sprites.pop(), shot)
    for _ in range(int(rng.integers(1, 3)) if domain.movers else 0):
        place(sprites.pop(), 0, mentioned=False)
    return tuple(actors), tuple(events)


def _inserts(domain, events, actors, rng) -> tuple[tuple[int, ...], int | None]:
    """Runs of spliced frames: about a third of the clip as noise, or a short shot that carries an answer."""
    if domain.insert is None:
        return (), None
    busy = {t for e in events for t in range(e.start - 1, e.end + 1)} if domain.insert == "still" else set()
    wanted, chosen = (4 if domain.aside else domain.frames * 3 // 10), set()
    for start in rng.permutation(domain.frames - 4):
        run = set(range(int(start), int(start) + int(rng.integers(3, 5))))
        if not run & busy and len(chosen) < wanted:
            chosen |= run
    cast = {a.sprite for a in actors}
    aside = int(rng.choice([s for s in domain.sprites if s not in cast])) if domain.aside and chosen else None
    return tuple(sorted(chosen)), aside


def _degraded(domain, events, rng) -> tuple[int, ...]:
    if domain.degrade is None:
        return ()
    moving = sorted({t for e in events for t in range(e.start, e.end)})
    if domain.degrade == "moving":
        return tuple(moving)
    return tuple(sorted(int(t) for t in rng.choice(domain.frames, size=len(moving), replace=False)))
