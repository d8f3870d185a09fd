"""Choose frames of a file or of an array of frames: opens the file, scores what the policy needs, selects.

| policy | goes by | decodes |
|---|---|---|
| uniform, random | the number of frames | nothing |
| keyframes | which frames the encoder stored whole | nothing |
| packets | bytes spent on each frame: equal steps of their sum, a fifth even in time | nothing |
| top-k | motion: the k largest | all |
| cumulative | motion: equal steps of its sum | all |
| cumulative-coverage | the same, a fifth of the sum even in time | all |
| lowbit-cumulative | the same with changes of the blocks' low-bit codes | all |
| lowbit-change | low-bit change against the last chosen frame | all |
| diverse | block means: farthest point | all |
| mmr | motion, against likeness of block means to those chosen | all |
| encoder | features of a (quantized) encoder, handed in: farthest point above its resolution | nothing |
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqlora.frames import select
from vqlora.frames.reader import VideoError, frame_times, packets, stream
from vqlora.frames.scores import FrameScores, packet_score, pick_yuv, score_frames, score_planes

COVERAGE = 0.2  # the share of time in the policies that have one
DEFAULT = "cumulative-coverage"
_PIXELS: dict[str, tuple[Callable[[FrameScores, int], np.ndarray], str]] = {
    "top-k": (lambda s, k: select.top_k(s.motion, k), "motion"),
    "cumulative": (lambda s, k: select.cumulative(s.motion, k), "motion"),
    "cumulative-coverage": (lambda s, k: select.cumulative(s.motion, k, COVERAGE), "motion"),
    "lowbit-cumulative": (lambda s, k: select.cumulative(s.change, k, COVERAGE), "change"),
    "lowbit-change": (lambda s, k: select.low_bit_change(s.codes, k), "change"),
    "diverse": (lambda s, k: select.diverse(s.thumbs, k), "median_distance"),
    "mmr": (lambda s, k: select.mmr(s.thumbs, s.motion, k), "motion"),
}
_STEPS = {"cumulative": 0.0, "cumulative-coverage": COVERAGE, "lowbit-cumulative": COVERAGE,
          "packets": COVERAGE}
POLICIES = ("uniform", "random", "keyframes", "packets", *_PIXELS, "encoder")


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
    if array and policy in ("keyframes", "packets"):
        raise ValueError(f"policy {policy!r} needs a video file: an array has no packets")
    name, curve, curve_name, scores = "array" if array else str(video), None, "", None
    if policy in _PIXELS or coverage is not None:
        scores = score_frames(video, colour=False) if array else score_video(video, colour=False)
        times_s = scores.times_s
    if policy in _PIXELS:
        rule, curve_name = _PIXELS[policy]
        choose, curve = (lambda k: rule(scores, k)), getattr(scores, curve_name)
    elif policy in ("keyframes", "packets"):
        table = packets(video)
        times_s = table.times_s
        choose, curve = _by_packets(table, policy)
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
            yield pick_yuv(*picture.yuv(), with_colour=colour)

    try:
        return score_planes(planes(), times_s)
    except ValueError as error:
        raise VideoError(path, None, str(error)) from None


def _by_packets(table, policy: str) -> tuple[Callable[[int], np.ndarray], np.ndarray]:
    score = packet_score(table.bytes, table.key, table.bidirectional)
    if policy == "keyframes":
        return (lambda k: select.key_frames(table.key, k)), score
    return (lambda k: select.cumulative(score, k, COVERAGE)), score


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
