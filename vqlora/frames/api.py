"""Choose frames of a file or of an array of frames: opens the file, scores what the policy needs, selects.

The policies are those of `vqlora.frames.policies`, and "encoder": features of a (quantized) encoder, handed
in, farthest point above its resolution.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqlora.frames import select
from vqlora.frames.policies import BY_PACKETS, BY_PIXELS, COVERAGE, packets_score
from vqlora.frames.reader import VideoError, frame_times, packets, stream
from vqlora.frames.scores import FrameScores, pick_yuv, score_frames, score_planes

# Of policies that need no model "own-segments" did best on validation clips in notebook 07, then this one;
# but of two speakers shown in turn that one would leave out the one who is shown for less long.
DEFAULT = "segments"
_STEPS = {"cumulative": 0.0, "cumulative-coverage": COVERAGE, "lowbit-cumulative": COVERAGE,
          "packets": COVERAGE}
POLICIES = ("uniform", "random", *BY_PACKETS, *BY_PIXELS, "encoder")


@dataclass(frozen=True)
class Selection:
    """Chosen `frames` (int64, ascending) of `n_frames`, with the time of every frame `times_s` `[T]`, and the
    `curve` `[T]` the policy went by, named `curve_name` (None for uniform, random, encoder). `reached` `[T]`
    is the sum of it that the chosen frames are equal steps of, for the policies that choose so."""

    frames: np.ndarray
    n_frames: int
    times_s: np.ndarray
    policy: str
    curve: np.ndarray | None = None
    curve_name: str = ""
    reached: np.ndarray | None = None


def select_frames(video: str | Path | np.ndarray, k: int | None = None, policy: str = DEFAULT, *,
                  coverage: float | None = None, seed: int = 0, features: np.ndarray | None = None,
                  resolution: float | np.ndarray = 0.0) -> np.ndarray:
    """Numbers of k frames that show what happens in a video, int64, ascending.

    >>> select_frames("clip.mp4", 8)
    >>> select_frames(frames, 4, "lowbit-change")               # uint8 [T, H, W, 3]
    >>> select_frames("clip.mp4", coverage=0.9)                 # as few as needed, see `select.coverage_of`

    policy      one of `POLICIES`; "keyframes" and "packets" need a file
    seed        of the policy "random"
    features    `[T, d]` for the policy "encoder", with `resolution` (see `select.tell_apart`)

    A video of fewer than k frames gives all it has, with a warning. Raises VideoError for a bad file and
    ValueError for a bad argument.
    """
    return selection(video, k, policy, coverage=coverage, seed=seed, features=features,
                     resolution=resolution).frames


def selection(video: str | Path | np.ndarray, k: int | None = None, policy: str = DEFAULT, *,
              coverage: float | None = None, seed: int = 0, features: np.ndarray | None = None,
              resolution: float | np.ndarray = 0.0) -> Selection:
    """`select_frames` with what it went by."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if (k is None) == (coverage is None):
        raise ValueError("give either k or coverage")
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if (features is not None) != (policy == "encoder"):
        raise ValueError(f"features are for the policy 'encoder', and it needs them; policy is {policy!r}")
    array = isinstance(video, np.ndarray)
    if array and policy in BY_PACKETS:
        raise ValueError(f"policy {policy!r} needs a video file: an array has no packets")
    name, curve, curve_name, scores = "array" if array else str(video), None, "", None
    if policy in BY_PIXELS or coverage is not None:
        scores = score_frames(video, colour=False) if array else score_video(video, colour=False)
        times_s = scores.times_s
    if policy in BY_PIXELS:
        rule, curve_name = BY_PIXELS[policy]
        choose, curve = (lambda k: rule(scores, k)), getattr(scores, curve_name)
    elif policy in BY_PACKETS:
        table = packets(video)
        times_s = table.times_s
        choose, curve = (lambda k: BY_PACKETS[policy](table, k)), packets_score(table)
        curve_name = "bytes, excess"
    else:
        if scores is None:
            times_s = np.arange(len(video), dtype=np.float64) if array else frame_times(video)
        choose = _blind(policy, len(times_s), seed, features, resolution)
    n_frames = len(times_s)
    if coverage is not None:
        if len(scores.thumbs) != n_frames:
            raise VideoError(name, None, f"{n_frames} packets but {len(scores.thumbs)} frames")
        seen = scores.thumbs if features is None else features
        chosen = select.fewest(n_frames, coverage, choose, seen)
    else:
        chosen = choose(k)
        if k > n_frames:
            warnings.warn(f"{name} has {n_frames} frames, fewer than the {k} asked for", stacklevel=3)
    steps = select.accumulated(curve, len(chosen), _STEPS[policy]) if policy in _STEPS else None
    return Selection(np.asarray(chosen, np.int64), n_frames, times_s, policy, curve, curve_name, steps)


def score_video(path: str | Path, *, sha256: str | None = None, colour: bool = True) -> FrameScores:
    """Score every frame of a file in one pass, in the memory of a few frames and about 500 bytes for each.

    Without `colour` only the differences are taken, which adds little to decoding. Raises VideoError.
    """
    times_s: list[float] = []

    def planes() -> Iterator:
        for picture in stream(path, sha256, twice=False):  # frames are read, and checked, later
            times_s.append(picture.time_s)
            yield pick_yuv(*picture.yuv(colour), with_colour=colour)

    try:
        return score_planes(planes(), times_s)
    except ValueError as error:
        raise VideoError(path, None, str(error)) from None


def _blind(policy: str, n_frames: int, seed: int, features: np.ndarray | None,
           resolution: float | np.ndarray) -> Callable[[int], np.ndarray]:
    """The policies that look at no pixel and no packet."""
    if policy == "uniform":
        return lambda k: select.uniform(n_frames, k)
    if policy == "random":
        return lambda k: select.random_frames(n_frames, k, np.random.default_rng(seed))
    if len(features) != n_frames:
        raise ValueError(f"features of {len(features)} frames for a video of {n_frames}")
    return lambda k: select.tell_apart(features, k, resolution)
