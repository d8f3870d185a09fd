"""The one shape every data set takes after loading: a clip with its captions, questions and timed segments.

Loaders (`vqlora.data.formats`) make these values and everything downstream reads them; nothing here touches a
disk.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PARTS = ("train", "val", "devtest", "test")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `choices[answer]` is right. `kind` groups results ("what", "order", ...).

    An open question (no candidates given) has its own answer as the only choice.
    """

    kind: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Segment:
    """One described stretch of a clip, in seconds from the clip's start."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class TrueEvent:
    """What really happens in a rendered clip, in frames, `end` exclusive; real data sets have none."""

    name: str
    motion: str
    start: int
    end: int


@dataclass(frozen=True)
class Clip:
    """A video (or the stretch `start_s`..`end_s` of one) with its annotations.

    `id` is unique within a data set, `part` is one of `PARTS`, `captions` maps a language code to its
    reference captions, and `events` is None where the truth is not known.
    """

    id: str
    path: Path
    part: str
    captions: Mapping[str, tuple[str, ...]]
    questions: tuple[Question, ...] = ()
    segments: tuple[Segment, ...] = ()
    events: tuple[TrueEvent, ...] | None = None
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"clip {self.id}: part {self.part!r} is not one of {', '.join(PARTS)}")


@dataclass(frozen=True)
class LeftOut:
    """A row that was not used: `source` is the file it stands in, `row` names it, `reason` says why."""

    source: str
    row: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its particulars: up to a colon or semicolon."""
        return re.split("[:;]", self.reason, maxsplit=1)[0]

    def __str__(self) -> str:
        return f"{self.source}: {self.row}: {self.reason}"


@dataclass(frozen=True)
class Noted(LeftOut):
    """A row that was used all the same: after a repair, or although it is odd; `reason` says which."""


@dataclass(frozen=True)
class Loaded:
    """What a loader returns: the usable clips in the file's order, everything that was left out, what was
    mended, and how many texts (captions, sentences, questions) of this part were read."""

    clips: tuple[Clip, ...]
    left_out: tuple[LeftOut, ...] = ()
    noted: tuple[Noted, ...] = ()
    read: int = 0

    def by_id(self) -> dict[str, Clip]:
        return {clip.id: clip for clip in self.clips}


def reasons(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """Count left-out rows by kind of reason, most frequent first, for logs and data sheets."""
    counts: dict[str, int] = {}
    for row in left_out:
        counts[row.kind] = counts.get(row.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def require_disjoint(**parts: Iterable[Clip]) -> None:
    """Refuse parts that share a clip, a video file, or overlapping stretches of one.

    >>> require_disjoint(train=train.clips, test=test.clips)

    Raises ValueError naming the first such clip, the two parts and how many there are; whatever protocols
    say, nobody trains on test clips.
    """
    seen: dict[str, list[tuple[str, Clip]]] = {}
    shared: dict[str, str] = {}
    for part, clips in parts.items():
        for clip in clips:
            for key in {clip.id, str(clip.path)}:
                others = [pair for pair in seen.setdefault(key, []) if pair[0] != part]
                for other_part, other in others:
                    if other.id == clip.id or _overlap(clip, other):
                        shared.setdefault(clip.id, f"of {part} is also in {other_part} (as {other.id})")
                seen[key].append((part, clip))
    if shared:
        first = next(iter(shared))
        raise ValueError(f"clip {first} {shared[first]}: not disjoint, {len(shared)} clips are shared")


def _overlap(a: Clip, b: Clip) -> bool:
    """Whether two clips of one file show a common moment."""
    end_a, end_b = (float("inf") if clip.end_s is None else clip.end_s for clip in (a, b))
    return max(a.start_s or 0.0, b.start_s or 0.0) < min(end_a, end_b)
