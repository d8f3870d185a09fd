"""What each frame adds to a video: one pass over the frames, a few hundred bytes kept of each.

Pure functions of pixels (or packet sizes); no file is opened here, see `vqlora.frames.api`. Symbols: T
frames, G blocks (about 16 x 16), luma in studio range (16 to 235), as decoders give it, whatever the source.

>>> scores = score_frames(frames)                   # uint8 [T, H, W, 3]
>>> scores.motion.shape, scores.features().shape
((48,), (48, 6))
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vqlora.frames.camera import block_means, unexplained

FEATURES = ("motion", "entropy", "scene", "time", "median_distance", "neighbour_difference")
BITS = 4
_LUMA_PX, _PICK_PX, _COLOUR_PX, _GRID, _CHUNK = 64, 48, 48, 16, 24
_FULL_RANGE = np.round(16 + np.arange(256) * 219 / 255).astype(np.uint8)

Planes = tuple[np.ndarray, np.ndarray | None]
"""(luma uint8 [h, w], colour uint8 [3, h', w'] as YUV or None), picked from one frame."""


@dataclass(frozen=True)
class FrameScores:
    """Scores of T frames; differences are to the frame before and 0 for the first.

    times_s              float64 [T], from the first frame's
    motion               mean |luma difference|, 0 to 1: sees every change, noise as well
    change               mean change of the blocks' low-bit codes, 0 to 1: noise under half a step vanishes
    entropy_bits         Shannon entropy of the whole frame's 8-bit luma, 0 to 8; blind to movement
    block_entropy_bits   mean over 4 x 4 areas of the entropy of their low-bit luma, 0 to `bits`
    content              mean |difference| in hue, saturation and value, as in PySceneDetect's ContentDetector
                         (0 to 255, cuts from 27 on), here on a picture of at most 48 px
    median_distance      mean |difference| of block means to the clip's median frame, 0 to 1
    neighbour_difference smaller of the differences to the previous and the next frame, 0 to 1: high where a
                         frame is unlike both, e.g. spliced in
    thumbs               uint8 [T, G], block means; `codes` uint8 [T, G], their low-bit codes
    moved                float16 [T, G], change of each block beyond what the camera did to all: shift,
                         brightness, contrast, sharpness (`vqlora.frames.camera`); grey levels

    Where only the differences were asked for, `content` and both entropies are NaN.
    """

    times_s: np.ndarray
    motion: np.ndarray
    change: np.ndarray
    entropy_bits: np.ndarray
    block_entropy_bits: np.ndarray
    content: np.ndarray
    median_distance: np.ndarray
    neighbour_difference: np.ndarray
    thumbs: np.ndarray
    codes: np.ndarray
    moved: np.ndarray
    bits: int = BITS

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def local(self) -> np.ndarray:
        """`local_change` of what moved, float64 `[T]`."""
        return local_change(self.moved)

    def features(self) -> np.ndarray:
        """What a temporal gate looks at: float32 `[T, 6]`, columns `FEATURES`, each roughly 0 to 1."""
        relative = self.times_s / max(self.times_s[-1], 1e-9)
        columns = (self.motion, self.block_entropy_bits / self.bits, self.content / 255, relative,
                   self.median_distance, self.neighbour_difference)
        return np.stack(columns, axis=1).astype(np.float32)


def score_frames(frames: np.ndarray, times_s: np.ndarray | None = None, *, bits: int = BITS,
                 colour: bool = True) -> FrameScores:
    """Score frames in memory: uint8 `[T, H, W, 3]` RGB or `[T, H, W]` grey. Raises ValueError."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim < 3 or not frames.size or frames.shape[3:] not in ((), (3,)):
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3] or "
                         "[T, H, W]")
    return score_planes((pick_rgb(frame, colour) for frame in frames), times_s, bits=bits)


def score_planes(planes: Iterable[Planes], times_s: Iterable[float] | None = None, *,
                 bits: int = BITS) -> FrameScores:
    """Score picked frames one after another (`pick_rgb`, `pick_yuv`); all must have one size.

    Frames picked without colour get neither `content` nor entropies, which saves nine tenths of the work.
    `times_s` is read after the planes, so it may be filled while they are made. Raises ValueError.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be from 1 to 8")
    parts = [_score_chunk(*chunk, bits) for chunk in _chunks(planes)]
    if not parts:
        raise ValueError("no frames to score")
    motion, content, entropy, block_entropy, thumbs, moved = map(np.concatenate, zip(*parts, strict=True))
    times = np.array(range(len(motion)) if times_s is None else list(times_s), np.float64)
    if len(times) != len(motion):
        raise ValueError(f"{len(times)} times for {len(motion)} frames")
    codes = low_bit_codes(thumbs, bits)
    before, after = _steps(thumbs), np.append(_steps(thumbs)[1:], np.inf)
    before[0] = np.inf if len(thumbs) > 1 else 0.0
    median = np.median(thumbs, axis=0).astype(np.float32)
    distance = np.abs(thumbs - median).mean(axis=1) / 255
    return FrameScores(times, motion, _steps(codes) * 255 / (2 ** bits - 1), entropy, block_entropy, content,
                       distance, np.minimum(before, after), thumbs, codes, moved, bits)


def pick_rgb(frame: np.ndarray, colour: bool = True) -> Planes:
    """The pixels that scores are taken of, from uint8 RGB `[H, W, 3]` or grey `[H, W]`."""
    step, colour_step = _step(frame.shape, _LUMA_PX), _step(frame.shape, _COLOUR_PX, even=True)
    if frame.ndim == 2:
        small = _FULL_RANGE[frame[::colour_step, ::colour_step]]
        grey = np.full_like(small, 128)
        return _FULL_RANGE[frame[::step, ::step]], np.stack([small, grey, grey]) if colour else None
    red, green, blue = (frame[::step, ::step, c].astype(np.uint16) for c in range(3))
    luma = ((66 * red + 129 * green + 25 * blue + 4224) >> 8).astype(np.uint8)
    if not colour:
        return luma, None
    rgb = frame[::colour_step, ::colour_step].astype(np.int32)
    yuv = (rgb @ np.array([[66, -38, 112], [129, -74, -94], [25, 112, -18]]) + [4224, 32896, 32896]) >> 8
    return luma, yuv.astype(np.uint8).transpose(2, 0, 1)


def pick_yuv(y: np.ndarray, u: np.ndarray, v: np.ndarray, full_range: bool = False, *,
             with_colour: bool = True) -> Planes:
    """The same from a decoder's planes, as `Picture.yuv` gives them; nothing is converted to RGB."""
    step, colour_step = _step(y.shape, _LUMA_PX), _step(y.shape, _COLOUR_PX, even=True)
    luma = _FULL_RANGE[y[::step, ::step]] if full_range else y[::step, ::step]
    if not with_colour:
        return luma, None
    small = y[::colour_step, ::colour_step]
    colour = np.empty((3, *small.shape), np.uint8)
    colour[0] = _FULL_RANGE[small] if full_range else small
    for place, plane in enumerate((u, v), 1):
        ratio = (-(-y.shape[0] // plane.shape[0]), -(-y.shape[1] // plane.shape[1]))
        if colour_step % ratio[0] or colour_step % ratio[1]:
            rows = np.arange(small.shape[0]) * colour_step // ratio[0]
            columns = np.arange(small.shape[1]) * colour_step // ratio[1]
            colour[place] = plane[rows[:, None], columns]
        else:
            colour[place] = plane[::colour_step // ratio[0], ::colour_step // ratio[1]]
    return luma, colour


def low_bit_codes(thumbs: np.ndarray, bits: int = BITS) -> np.ndarray:
    """Block means `[T, G]` uint8 -> codes of `bits` bits `[T, G]` uint8.

    A block keeps its code until its mean is more than half a step outside the code's range, so that noise
    smaller than that makes no change even where the mean lies on an edge between two codes.
    """
    step = 256 >> bits
    codes = thumbs // step
    current = codes[0] * np.int16(2 * step) + np.int16(step - 1)  # twice the middle of the code's range
    off, outside = np.empty_like(current), np.empty(current.shape, bool)
    for mean, code, before in zip(thumbs[1:] * np.int16(2), codes[1:], codes, strict=False):
        np.subtract(mean, current, out=off)
        np.greater(np.abs(off, out=off), 2 * step, out=outside)
        np.copyto(code, before, where=~outside)
        if outside.any():
            np.multiply(code, np.int16(2 * step), out=current)
            current += np.int16(step - 1)
    return codes


def local_change(moved: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean of the `share` of blocks that moved most: float64 `[T]`, 0 to 1, 0 for the first frame.

    moved: as in `FrameScores`. Something small stands out as much as a cut, and flicker does not.
    """
    top = max(1, round(share * moved.shape[1]))
    return np.partition(moved, -top, axis=1)[:, -top:].mean(axis=1, dtype=np.float64) / 255


def packet_score(sizes: np.ndarray, key: np.ndarray, bidirectional: np.ndarray) -> np.ndarray:
    """How much each frame changed, from the bytes the encoder spent on it: float64 `[T]`, 0 in calm
    stretches.

    All in order of display. Sizes are divided by the median size of their type (frames predicted from one
    side, from both sides), and the score is what they exceed the clip's median by. A key frame's size tells
    of its picture and not of change: it gets its neighbours' mean, or, where it comes before its regular turn
    (the encoder saw a cut), the largest score of all. The first frame has none. In a file of key frames alone
    it is the change of size.
    """
    sizes, key = np.asarray(sizes, np.float64), np.asarray(key, bool)
    score = np.ones(len(sizes))
    for kind in (~key & ~bidirectional, ~key & bidirectional):
        if kind.any():
            score[kind] = sizes[kind] / max(np.median(sizes[kind]), 1.0)
    starts = np.flatnonzero(key)
    if key.all():  # nothing is predicted: changes of size are all there is
        return np.abs(np.diff(sizes, prepend=sizes[:1])) / max(np.median(sizes), 1.0)
    interval = np.diff(starts, append=len(sizes)).max() if len(starts) else 0
    for number, start in enumerate(starts):
        near = [score[t] for t in (start - 1, start + 1) if 0 <= t < len(score) and not key[t]]
        score[start] = np.mean(near) if near else 1.0
        if number and start - starts[number - 1] < interval:
            score[start] = max(score[start], score[~key].max())
    score = np.maximum(score - np.median(score), 0)
    score[0] = 0.0  # nothing before it
    return score


def scene_cuts(content: np.ndarray, threshold: float = 27.0, min_frames: int = 15) -> np.ndarray:
    """Frame numbers where scenes begin, int64, as PySceneDetect's ContentDetector gives them with its default
    filter: cuts that follow one another within `min_frames` are merged into the last of them."""
    cuts, last, merging, start, enabled = [], 0, False, 0, False
    for number, above in enumerate(np.asarray(content) >= threshold):
        far = number - last >= min_frames
        last = number if above else last
        if merging:
            if far and not above and last - start >= min_frames:
                merging = False
                cuts.append(last)
        elif above and (far or min_frames <= 0):
            enabled = True
            cuts.append(number)
        elif above and enabled:
            merging, start = True, number
    return np.array(cuts, dtype=np.int64)


def _chunks(planes: Iterable[Planes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(luma [1 + n, h, w], colour [1 + n, 3, h', w']): row 0 is the frame before."""
    luma = colour = None
    none, count = np.empty((3, 0, 0), np.uint8), 0
    for y, yuv in planes:
        yuv = none if yuv is None else yuv
        if luma is None:
            luma = np.empty((_CHUNK + 1, *y.shape), np.uint8)
            colour = np.empty((_CHUNK + 1, *yuv.shape), np.uint8)
            luma[0], colour[0] = y, yuv
        if y.shape != luma.shape[1:]:
            raise ValueError("the picture size changes within the video")
        count += 1
        luma[count], colour[count] = y, yuv
        if count == _CHUNK:
            yield luma, colour
            luma[0], colour[0], count = luma[count], colour[count], 0
    if count:
        yield luma[: count + 1], colour[: count + 1]


def _score_chunk(luma: np.ndarray, colour: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """(motion, content, entropy, block entropy, thumbs, moved) of the frames from row 1 on."""
    difference = np.maximum(luma[1:], luma[:-1])
    difference -= np.minimum(luma[1:], luma[:-1])
    n = len(difference)
    motion = difference.reshape(n, -1).sum(axis=1, dtype=np.uint32) / (255.0 * difference[0].size)
    means = block_means(luma, _GRID)
    thumbs, moved = means[1:].reshape(n, -1), unexplained(luma, means).astype(np.float16)
    if not colour.size:
        return motion, *np.full((3, n), np.nan), thumbs, moved
    step = _step(luma.shape[1:], _PICK_PX)
    hsv = _hsv(colour)
    content = np.abs(hsv[1:] - hsv[:-1]).reshape(n, -1)
    content = content @ np.full(content.shape[1], 1 / content.shape[1], np.float32)
    return motion, content, *_entropies(luma[1:, ::step, ::step], bits), thumbs, moved


def _entropies(picks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    n, height, width = picks.shape
    size = height * width
    area = (np.arange(height) * 4 // height)[:, None] * 4 + np.arange(width) * 4 // width
    places = (picks >> (8 - bits)) + (area << bits).astype(np.uint16)
    whole = np.stack([np.bincount(row, minlength=256) for row in picks.reshape(n, size)])
    low = np.stack([np.bincount(row, minlength=16 << bits) for row in places.reshape(n, size)])
    table = np.arange(size + 1, dtype=np.float64)
    table[1:] *= np.log2(table[1:])  # c log c, by count
    whole_bits = np.log2(size) - table[whole].sum(axis=1) / size
    inside = np.bincount(area.ravel(), minlength=16)
    block_bits = (table[inside] - table[low].reshape(n, 16, -1).sum(axis=2)) / np.maximum(inside, 1)
    return whole_bits, block_bits.sum(axis=1) / (inside > 0).sum()


def _hsv(yuv: np.ndarray) -> np.ndarray:
    """uint8 YUV (BT.601, studio range) `[n, 3, h, w]` -> float32 hue (0 to 180), saturation and value (0 to
    255), as 8-bit pictures have them in computer vision."""
    green, u, v = (yuv[:, c].astype(np.float32) for c in range(3))
    green -= 16
    green *= 1.164
    u -= 128
    v -= 128
    red, blue = green + np.float32(1.596) * v, green + np.float32(2.017) * u
    green -= np.float32(0.392) * u
    green -= np.float32(0.813) * v
    for part in (red, green, blue):
        np.minimum(np.maximum(part, 0, out=part), 255, out=part)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    is_red, is_green = (value == red).astype(np.float32), (value == green).astype(np.float32)
    is_green *= 1 - is_red  # sums of products: masked copies take three times as long
    is_blue = 1 - is_red - is_green
    hue = (green - blue) * is_red + (blue - red) * is_green + (red - green) * is_blue
    hue *= np.float32(30) / np.maximum(spread, np.float32(0.5))  # greys: nearly 0
    hue += 60 * is_green + 120 * is_blue
    hue += 180 * (hue < 0)
    spread *= 255
    spread /= np.maximum(value, np.float32(1e-6))
    return np.stack([hue, spread, value], axis=1)


def _steps(rows: np.ndarray) -> np.ndarray:
    """Mean |difference| to the row before over 255, float64 `[T]`, 0 first."""
    steps = np.zeros(len(rows))
    for start in range(1, len(rows), 4096):  # in pieces: an hour of frames is 100,000 rows
        piece = rows[start - 1:start + 4096].astype(np.int16)
        steps[start:start + 4096] = np.abs(np.diff(piece, axis=0)).mean(axis=1)[: 4096] / 255
    return steps


def _step(shape: tuple[int, ...], longest: int, even: bool = False) -> int:
    """The stride that leaves at most `longest` pixels of the longer side; an even one meets chroma planes of
    half the size without rounding."""
    step = -(-max(shape[:2]) // longest)
    return step + step % 2 if even and step > 1 else step
