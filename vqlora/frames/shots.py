"""Shots of a video, and which of them break into another: pure functions of its scores.

A cut replaces the picture. Where the picture from before a cut comes back later, what lay between broke
into it: frames of another clip, an advertisement, a reaction shot. Whether such frames are noise or part of
what is told no score can know; `own_segments` leaves them out, `select.segments` does not, and a data set's
validation clips tell which is better. Symbols: T frames, G blocks, see `vqlora.frames.scores.FrameScores`.
"""
from __future__ import annotations

from itertools import pairwise

import numpy as np

from vqlora.frames import select

_CUT = 10.0         # grey levels: mean change of the blocks at a cut
_UNEXPLAINED = 1.5  # and the median one beyond what the camera did
_LOOK = 16          # shots: how far back a picture is looked for


def shots(thumbs: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """First frames of all shots, and T at the end: int64, from 0. `thumbs` uint8 and `moved` `[T, G]`.

    A cut changes the blocks by `_CUT` grey levels in the mean, and half of them by more than `_UNEXPLAINED`
    beyond shift, light and focus: flicker, pans and blur are none.
    """
    change = np.abs(np.diff(thumbs.astype(np.int16), axis=0)).mean(axis=1)
    beyond = np.median(moved[1:].astype(np.float32), axis=1)
    cuts = np.flatnonzero((change > _CUT) & (beyond > _UNEXPLAINED)) + 1
    return np.concatenate([[0], cuts, [len(thumbs)]])


def interruptions(thumbs: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Frames of shots that break into a longer scene, which goes on after them: bool `[T]`.

    Shots are of one scene where their median pictures are less than half as far apart as the cuts between
    them are wide (median over blocks of the difference). Scenes are gone through from the longest on: each
    that lies, once at least, between two shots of a longer one is an interruption wherever it shows.
    """
    edges = shots(thumbs, moved)
    lengths, found = np.diff(edges), np.zeros(len(thumbs), bool)
    pictures = [np.median(thumbs[start:end], axis=0) for start, end in pairwise(edges)]
    scenes = _scenes(np.stack(pictures))
    names, total = np.unique(scenes), np.bincount(scenes, lengths)
    foreign: set[int] = set()
    for scene in sorted(names, key=lambda name: -total[name]):
        places = np.flatnonzero(scenes == scene)
        if scene not in foreign:
            between = np.unique(scenes[places[0]:places[-1]])
            foreign |= {int(other) for other in between if total[other] < total[scene]}
    for number in np.flatnonzero(np.isin(scenes, list(foreign))):
        found[edges[number]:edges[number + 1]] = True
    return found


def own_segments(thumbs: np.ndarray, moved: np.ndarray, k: int) -> np.ndarray:
    """`select.segments` of the frames that are no `interruptions`; those alone where they are fewer than k,
    filled up to k from the rest."""
    own = np.flatnonzero(~interruptions(thumbs, moved))
    if len(own) <= k:
        return select.filled(own, len(thumbs), k)
    joined = moved[own]
    for place in np.flatnonzero(np.diff(own) > 1) + 1:  # over what was left out; the camera is still
        step = thumbs[own[place]].astype(np.float32) - thumbs[own[place - 1]]
        joined[place] = np.abs(step - np.median(step))
    return own[select.segments(joined, k)]


def _scenes(pictures: np.ndarray) -> np.ndarray:
    """The scene of each shot, named by its first one: int64 `[n]`, from their median pictures `[n, G]`."""
    scenes = np.arange(len(pictures))
    widths = np.median(np.abs(np.diff(pictures, axis=0)), axis=1)  # of the cut after each
    for now in range(2, len(pictures)):
        first = max(0, now - _LOOK)
        distances = np.median(np.abs(pictures[first:now - 1] - pictures[now]), axis=1)
        alike = distances < np.minimum(widths[first:now - 1], widths[now - 1]) / 2
        if alike.any():
            scenes[now] = scenes[first + int(np.where(alike, distances, np.inf).argmin())]
    return scenes
