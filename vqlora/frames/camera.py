"""What moved in the scene and not with the camera: each block's change beyond what happened to all of them.

A camera pans and shakes, which shifts the whole picture; light and exposure change its brightness and
contrast, focus its sharpness. All of that is fitted to two frames and taken off; what none of it explains is
left. Pure functions of picked luma and block means, see `vqlora.frames.scores`. Symbols: n pairs of frames,
h x w picked pixels, R x C blocks, G = R C.
"""
from __future__ import annotations

import numpy as np

STILL = 2.0     # grey levels: where four fifths of the blocks change by less, the camera did nothing
_FIFTHS = 0.8   # of the blocks: what moves by itself covers less than the rest
_ROUNDS, _OUTLYING, _RIDGE = 3, 3.0, 1.0


def unexplained(luma: np.ndarray, means: np.ndarray) -> np.ndarray:
    """|Change| of each block that no change of the whole picture explains: float32 `[n, G]`, grey levels.

    luma uint8 `[1 + n, h, w]` and its block means uint8 `[1 + n, R, C]`; row 0 is the frame before. Of frames
    that hardly change as a whole the median change is taken off. Of the others: the frame before is shifted
    along with the camera where that explains most of the blocks, then brightness, contrast and sharpness are
    fitted to the blocks that follow them (least squares, outlying blocks left out, thrice).
    """
    before, now = means[:-1].astype(np.float32), means[1:].astype(np.float32)
    rest = _centred(now - before)
    restless = np.flatnonzero(_reached(np.abs(rest)) > STILL)
    if len(restless):
        moves = shifts(luma, restless)
        pairs, moves = restless[moves.any(axis=1)], moves[moves.any(axis=1)]
        if len(pairs):
            shifted, inside = _shifted(luma[pairs], moves)
            shifted = np.where(inside, shifted, now[pairs])  # what came into the picture is not known
            explains = _reached(np.abs(_centred(now[pairs] - shifted) * inside)) <= 0.6 * _reached(
                np.abs(rest[pairs] * inside))
            before[pairs[explains]] = shifted[explains]
        rest[restless] = _beyond_light(before[restless], now[restless])
    return np.abs(rest).reshape(len(rest), -1)


def shifts(luma: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """By how many pixels (down, right) the picture moved between frames `pairs` and the next: int64 `[m, 2]`.

    By the sums of rows and of columns, whose steps are compared at every shift up to a tenth of the side; a
    shift counts where it explains a fifth of their difference.
    """
    found = []
    for axis in (2, 1):
        profiles = luma.sum(axis=axis, dtype=np.int32) / np.float32(luma.shape[axis])
        edges = np.diff(profiles, axis=1)  # blind to brightness
        reach = luma.shape[3 - axis] // 10
        if not reach:
            found.append(np.zeros(len(pairs), np.int64))
            continue
        size, old, new = edges.shape[1], edges[pairs], edges[pairs + 1]
        costs = np.stack([np.abs(new[:, max(0, s):size + min(0, s)] - old[:, max(0, -s):size - max(0, s)])
                          .mean(axis=1) for s in range(-reach, reach + 1)], axis=1)
        found.append(np.where(costs.min(axis=1) < 0.8 * costs[:, reach], costs.argmin(axis=1) - reach, 0))
    return np.stack(found, axis=1)


def block_means(luma: np.ndarray, grid: int = 16) -> np.ndarray:
    """uint8 `[n, h, w]` -> `[n, R, C]`; what fills no block at the right and lower edge is left out."""
    n, height, width = luma.shape
    tall, wide = block_size((height, width), grid)
    rows, columns = height // tall, width // wide
    luma = luma[:, : rows * tall, : columns * wide].reshape(n, rows, tall, columns * wide)
    sums = luma[:, :, 0].astype(np.uint16)  # adding whole rows is five times as fast as .sum(axis=2)
    for row in range(1, tall):
        sums += luma[:, :, row]
    sums = sums.reshape(n, rows, columns, wide)
    total = sums[..., 0] + np.uint16(tall * wide // 2)
    for column in range(1, wide):
        total += sums[..., column]
    return (total // np.uint16(tall * wide)).astype(np.uint8)


def block_size(shape: tuple[int, int], grid: int = 16) -> tuple[int, int]:
    """(height, width) of a block in pixels, so that about grid x grid of them cover a picture."""
    return max(1, round(shape[0] / grid)), max(1, round(shape[1] / grid))


def _shifted(luma: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block means `[p, R, C]` of pictures that moved by `[p, 2]`, and which of them a picture still fills."""
    rolled = [np.roll(one, tuple(move), (0, 1)) for one, move in zip(luma, moves, strict=True)]
    means = block_means(np.stack(rolled))
    fills = []
    for move, size, count in zip(moves.T, block_size(luma.shape[1:]), means.shape[1:], strict=True):
        place = np.arange(count) - (move / size)[:, None]  # of a row or column, in the frame before
        fills.append((place >= 0) & (place <= count - 1))
    return means.astype(np.float32), fills[0][:, :, None] & fills[1][:, None, :]


def _beyond_light(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """What is left of `[m, R, C]` steps after brightness, contrast and sharpness."""
    middle = (before + now) / 2
    edge = np.pad(middle, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = edge[:, 1:-1, 2:] + edge[:, 1:-1, :-2] + edge[:, 2:, 1:-1] + edge[:, :-2, 1:-1]
    contrast = (middle - middle.mean(axis=(1, 2), keepdims=True)) / 64  # columns of like size
    causes = np.stack([np.ones_like(middle), contrast, (around - 4 * middle) / 16], axis=-1)
    causes, steps = causes.reshape(len(now), -1, 3), (now - before).reshape(len(now), -1)
    rest = _centred(steps)
    for _ in range(_ROUNDS):
        spread = 1.4826 * _median(np.abs(rest))
        used = causes * (np.abs(rest) < _OUTLYING * np.maximum(spread, 0.5))[..., None]
        normal = used.transpose(0, 2, 1) @ causes + _RIDGE * np.eye(3, dtype=np.float32)
        found = np.linalg.solve(normal, used.transpose(0, 2, 1) @ steps[..., None])
        rest = steps - (causes @ found)[..., 0]
    return rest.reshape(now.shape)


def _centred(steps: np.ndarray) -> np.ndarray:
    return steps - _median(steps.reshape(len(steps), -1)).reshape(-1, *[1] * (steps.ndim - 1))


def _median(rows: np.ndarray) -> np.ndarray:
    """The upper median of each row, `[m, 1]`; a tenth of the time of numpy's for rows as short as these."""
    place = rows.shape[1] // 2
    return np.partition(rows, place, axis=1)[:, place:place + 1]


def _reached(sizes: np.ndarray) -> np.ndarray:
    """What four fifths of the blocks of each row stay under."""
    flat = sizes.reshape(len(sizes), -1)
    place = int(_FIFTHS * (flat.shape[1] - 1))
    return np.partition(flat, place, axis=1)[:, place]
