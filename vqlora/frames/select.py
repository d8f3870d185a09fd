"""Which frames to look at: pure functions from a clip's length (and what is known of it) to frame numbers.

Every policy returns `min(k, n_frames)` distinct frame numbers in ascending order, as int64, for any k from 1;
where frames tie, the earlier is taken. T frames, G blocks; scores are those of `vqlora.frames.scores`.

>>> cumulative(scores.motion, 8, coverage=0.2)      # more frames where more happens, some everywhere
>>> fewest(len(scores), 0.9, lambda k: diverse(scores.thumbs, k), scores.thumbs)     # as few as needed
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vqlora.data.clips import TrueEvent
from vqlora.frames.scores import local_change


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


def cover(n_frames: int, k: int, events: Sequence[TrueEvent | Stretch]) -> np.ndarray:
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
    return filled(np.array(sorted(chosen)), n_frames, k)


def mixed(n_frames: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Even, jittered or wholly random frames, a third of the time each: what any policy may choose."""
    _checked(n_frames, k)
    kind = rng.integers(3)
    if kind == 0 or k >= n_frames:
        return uniform(n_frames, k)
    if kind == 1:
        return jittered(n_frames, k, rng)
    return np.sort(rng.permutation(n_frames)[:k])


def random_frames(n_frames: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """k frames drawn evenly without replacement."""
    _checked(n_frames, k)
    return np.sort(rng.permutation(n_frames)[:k])


def key_frames(key: np.ndarray, k: int) -> np.ndarray:
    """Frames that the encoder stored whole (`key` bool `[T]`), evenly chosen among them; where there are
    fewer than k, the gaps in time are filled."""
    key = np.asarray(key, bool)
    _checked(len(key), k)
    there = np.flatnonzero(key)
    return filled(there[uniform(len(there), k)] if len(there) else there, len(key), k)


def top_k(score: np.ndarray, k: int) -> np.ndarray:
    """The k highest scores, `[T]`: all k may lie within one event."""
    score = _scores(score, k)
    return np.sort(np.argsort(-score, kind="stable")[:k])


def cumulative(score: np.ndarray, k: int, coverage: float = 0.0) -> np.ndarray:
    """Equal steps of accumulated change: the centres of k equal parts of the sum of `score` `[T]` >= 0.

    A frame counts for at most one part, so that a cut, however hard, gets one frame and not several alike.
    `coverage`, 0 to 1, is the share of the sum that is spread evenly over time; at 1, and where nothing
    changes, this is `uniform`.
    """
    n, reached = len(score), accumulated(score, k, coverage)
    if k >= n or not np.any(score):
        return uniform(n, k)
    targets = (2 * np.arange(k) + 1) / (2 * k) * reached[-1]
    return _distinct(np.searchsorted(reached, targets + 1e-12, side="right"), n)


def accumulated(score: np.ndarray, k: int, coverage: float = 0.0) -> np.ndarray:
    """What `cumulative` takes equal steps of, float64 `[T]`, rising: the sum so far."""
    score = _scores(score, k)
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be from 0 to 1")
    if score.min() < 0:
        raise ValueError(f"a score of {score.min():g} cannot be accumulated; scores must be at least 0")
    n, total = len(score), score.sum()
    even = np.full(n, 1 / n)
    return np.cumsum(_capped((1 - coverage) * score / total + coverage * even, k) if total > 0 else even)


def segments(moved: np.ndarray, k: int) -> np.ndarray:
    """Frames that show each stretch of change as `cover` shows true events: its middle, what it led to, more.

    `moved` `[T, G]` is `FrameScores.moved`. Stretches are found by `stretches`; of more than k the strongest
    are shown. Where nothing stands out the choice is uniform.
    """
    found = sorted(stretches(moved), key=lambda stretch: -stretch.strength)[:k]
    return cover(len(moved), k, found)


@dataclass(frozen=True)
class Stretch:
    """Frames `start` to `end` (exclusive) in which something changes; `strength`: all excess change."""

    start: int
    end: int
    strength: float


def stretches(moved: np.ndarray) -> list[Stretch]:
    """Where something small changes for at least two frames, in order of time; `moved` `[T, G]`.

    By `scores.local_change`, high above its 30% quantile: a video is taken to be still at least so long. High
    is more than twice the spread below that (noise) and a tenth of what the highest tenth reaches. A gap of
    one frame is bridged, but where change jumps to blocks that it had not touched, another stretch begins. A
    cut is over at once and is none.
    """
    steps = local_change(moved)[1:]
    if len(steps) < 2:
        return []
    low, floor, high = np.quantile(steps, (0.05, 0.3, 0.9))
    excess = np.append(0.0, steps - floor)
    frames = np.flatnonzero(excess > max(2 * (floor - low), 0.1 * (high - floor), 1e-9))
    found = []
    for run in np.split(frames, np.flatnonzero(np.diff(frames) > 2) + 1):
        for part in np.split(run, _jumps(moved, run)):
            if len(part) and part[-1] > part[0]:
                strength = float(excess[part[0]:part[-1] + 1].sum())
                found.append(Stretch(int(part[0]), int(part[-1]) + 1, strength))
    return found


def _jumps(moved: np.ndarray, run: np.ndarray) -> list[int]:
    """Places in a run of changing frames where none of the blocks that change did so in the three before."""
    sizes = np.asarray(moved)[run]
    touched = sizes > 0.4 * sizes.max(axis=1, keepdims=True, initial=0)
    places, last = [], 0
    for place in range(1, len(run)):
        before = touched[max(last, place - 3):place].any(axis=0)
        if not (before & touched[place:place + 2].any(axis=0)).any():
            places.append(place)
            last = place
    return places


def diverse(features: np.ndarray, k: int, resolution: float = 0.0) -> np.ndarray:
    """Farthest point: from the frame nearest to the clip's median on, always the frame that is least like all
    chosen ones. `features` `[T, d]`, distance = mean absolute difference (Gonzalez 1985).

    Distances up to `resolution` count as none, and once no frame is farther than that from all chosen ones
    the rest is filled evenly in time.
    """
    features = np.asarray(features)
    _checked(len(features), k)
    if k >= len(features):
        return np.arange(len(features))
    chosen = [int(_distance(features, np.median(features, axis=0)).argmin())]
    nearest = _distance(features, features[chosen[0]])
    while len(chosen) < k and nearest.max() > resolution:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distance(features, features[chosen[-1]]))
    return filled(np.array(chosen), len(features), k)


def mmr(features: np.ndarray, relevance: np.ndarray, k: int, weight: float = 0.5) -> np.ndarray:
    """Maximal marginal relevance (Carbonell and Goldstein 1998): one after another the frame with the largest
    weight x relevance - (1 - weight) x similarity to the most similar chosen one, both scaled to 0..1.
    `features` `[T, d]`, `relevance` `[T]`."""
    features, score = np.asarray(features), _scores(relevance, k)
    if len(features) != len(score):
        raise ValueError(f"{len(features)} rows of features for {len(score)} scores")
    if k >= len(score):
        return np.arange(len(score))
    score = (score - score.min()) / (np.ptp(score) or 1.0)
    chosen, taken = [int(score.argmax())], np.zeros(len(score), bool)
    nearest = _distance(features, features[chosen[0]])
    widest = nearest.max() or 1.0
    while len(chosen) < k:
        taken[chosen[-1]] = True
        gain = weight * score - (1 - weight) * (1 - nearest / widest)
        chosen.append(int(np.where(taken, -np.inf, gain).argmax()))
        nearest = np.minimum(nearest, _distance(features, features[chosen[-1]]))
    return np.sort(np.array(chosen, dtype=np.int64))


def low_bit_change(codes: np.ndarray, k: int) -> np.ndarray:
    """Frames whose low-bit code differs much from the last kept frame's, and never 4T/k apart in time.

    `codes` `[T, G]` (`low_bit_codes`). Going forward from frame 0, a frame is kept when its mean |code
    difference| to the last kept one reaches a threshold, or 2T/k frames after it at the latest. The threshold
    is the highest that keeps at least k (the lowest there is, where none does), and of those an even choice
    is taken. For k = 1 it is the frame nearest to the median.
    """
    codes = np.asarray(codes)
    _checked(len(codes), k)
    if k == 1 or k >= len(codes):
        return diverse(codes, k)
    gap = -(-2 * len(codes) // k)
    low, high = 0.0, float(np.ptp(codes, axis=0).mean()) + 1.0
    kept = _kept(codes, 1e-9, gap)
    for _ in range(14):
        middle = (low + high) / 2
        found = _kept(codes, middle, gap)
        if len(found) >= k:
            low, kept = middle, found
        else:
            high = middle
    return filled(kept[uniform(len(kept), k)], len(codes), k)


def tell_apart(features: np.ndarray, k: int, resolution: float | np.ndarray) -> np.ndarray:
    """Frames that a quantized encoder can still tell apart.

    `features` `[T, d]` are the encoder's own, e.g. of its 4-bit vision tower at low resolution. `resolution`
    is what quantization does to one frame's features: a number, or the features `[T, d]` of the same frames
    without quantization, of which the median distance is taken. Two frames nearer than that are one to it.
    """
    features = np.asarray(features, dtype=np.float32)
    if np.ndim(resolution):
        exact = np.asarray(resolution, dtype=np.float32)
        if exact.shape != features.shape:
            raise ValueError(f"features are {features.shape} quantized and {exact.shape} not")
        resolution = float(np.median(np.abs(features - exact).mean(axis=1)))
    return diverse(features, k, float(resolution))


def coverage_of(features: np.ndarray, chosen: np.ndarray) -> float:
    """How well chosen frames stand for all: 1 - mean distance of a frame to the nearest chosen one, over its
    mean distance to the median frame. 1 is perfect; below 0 is worse than one average picture."""
    features = np.asarray(features)
    spread = _distance(features, np.median(features, axis=0)).mean()
    nearest = np.min([_distance(features, features[frame]) for frame in chosen], axis=0).mean()
    return 1.0 if spread == 0 else float(1 - nearest / spread)


def fewest(n_frames: int, coverage: float, choose: Callable[[int], np.ndarray],
           features: np.ndarray) -> np.ndarray:
    """`choose(k)` for the smallest k, found by bisection, whose `coverage_of` is at least `coverage`."""
    if not coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it can be at most 1")
    low, high = 0, 1
    while high < n_frames and coverage_of(features, choose(high)) < coverage:
        low, high = high, min(2 * high, n_frames)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if coverage_of(features, choose(middle)) >= coverage else (middle, high)
    return choose(high)


def _checked(n_frames: int, k: int) -> None:
    if n_frames < 1 or k < 1:
        raise ValueError(f"cannot choose {k} of {n_frames} frames; both must be at least 1")


def _scores(score: np.ndarray, k: int) -> np.ndarray:
    score = np.asarray(score, dtype=np.float64)
    _checked(len(score), k)
    if not np.isfinite(score).all():
        raise ValueError(f"the score of frame {np.flatnonzero(~np.isfinite(score))[0]} is not a number")
    return score


def _capped(weights: np.ndarray, k: int) -> np.ndarray:
    """Weights cut to the largest limit that is at most a k-th of what is then their sum."""
    falling = np.sort(weights)[::-1]
    for over in range(min(k, len(weights))):
        limit = falling[over:].sum() / (k - over)
        if falling[over] <= limit:
            return np.minimum(weights, limit) if limit > 0 else (weights > 0).astype(np.float64)
    return (weights > 0).astype(np.float64)


def _distance(features: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Mean |difference| of each row `[T, d]` to a point `[d]`, float32 `[T]`, in pieces of little memory."""
    kind = np.int16 if features.dtype == np.uint8 and point.dtype == np.uint8 else np.float32
    out, point = np.empty(len(features), np.float32), point.astype(kind)
    for start in range(0, len(features), 1024):
        out[start:start + 1024] = np.abs(features[start:start + 1024] - point).mean(axis=1)
    return out


def _kept(codes: np.ndarray, threshold: float, gap: int) -> np.ndarray:
    """The frames kept on the way forward."""
    kept, last = [0], 0
    while last + 1 < len(codes):
        far = min(last + gap, len(codes))
        start, found = last + 1, -1
        while start < far and found < 0:  # most often the next kept frame is near
            stop = min(start + 64, far)
            moved = _distance(codes[start:stop], codes[last])
            over = np.flatnonzero(moved >= threshold)
            found = start + int(over[0]) if len(over) else -1
            start = stop
        if found < 0 and far == len(codes):
            break
        last = found if found >= 0 else far - 1
        kept.append(last)
    return np.array(kept)


def _distinct(places: np.ndarray, n_frames: int) -> np.ndarray:
    """Ascending places with repeats -> distinct ones, moved later, or earlier at the end of the video."""
    order = np.arange(len(places))
    later = np.maximum.accumulate(places - order) + order
    return np.minimum(later, n_frames - len(places) + order).astype(np.int64)


def filled(chosen: np.ndarray, n_frames: int, k: int) -> np.ndarray:
    """At least the chosen frames, and up to k in all: always the frame farthest in time from the others."""
    if not len(chosen):
        return uniform(n_frames, k)
    frames, k = np.unique(np.asarray(chosen, dtype=np.int64)), min(k, n_frames)
    distance = np.abs(np.arange(n_frames)[:, None] - frames).min(axis=1)
    while len(frames) < k:
        frame = int(distance.argmax())
        frames = np.append(frames, frame)
        distance = np.minimum(distance, np.abs(np.arange(n_frames) - frame))
    return np.sort(frames)
