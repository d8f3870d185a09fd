r"""The method in one picture: no result in it, only shapes, the paper's symbols and one rendered clip.

    method(results)     # frames -> selection; frozen base with low-rank updates; gate; one gated layer

What is drawn of the clip is computed by the library: its frame features, and the frames that equal steps of
accumulated motion choose (Equation `cumulative`). Gates are those of fixed weights, to show their shape.
Lengths are inches on the page; colours of the three parts are those of every other figure.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from vqlora.report.gate_plots import PARTS
from vqlora.report.samples import read_samples

SIZE = (6.5, 3.62)
NAMES = {"vision": "Vision tower", "fusion": "Fusion", "text": "Decoder"}
FEATURES = {  # column of FrameScores: name (Equation `features`)
    "motion": "motion",
    "median_distance": "median",
    "neighbour_difference": "neighbours",
    "times_s": "time",
}
BLOCKS = {  # part: left edge, width, ranks of the layers that are drawn
    "vision": (2.72, 0.98, (1, 3, 5, 4)),
    "fusion": (3.98, 0.56, (3, 2)),
    "text": (4.82, 0.98, (2, 6, 3, 4)),
}
CHOSEN, RANKS, SHOWN = 4, 5, 1  # the layer beside the gates is drawn for the second chosen frame
INK, GREY, BODY, SMALL = "0.15", "0.45", 7.0, 6.5
TIMES = 4.94  # where gates meet the adapter
RING = {"facecolor": "none", "edgecolor": "black", "linewidth": 1.1, "zorder": 4}
FROZEN = {"facecolor": "0.9", "edgecolor": "0.55", "hatch": "//////", "linewidth": 0.6}


def method(results: Path) -> Figure:
    """How a clip passes through the method: selection, 4-bit base, rank budget, gate and gated layer."""
    frames = read_samples(Path(results)).frames("cutaways")
    features, chosen = _scores(frames)
    figure, page = plt.subplots(figsize=SIZE)
    page.set_position((0, 0, 1, 1))
    page.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    page.set_axis_off()
    with plt.rc_context({"hatch.linewidth": 0.35}):
        _selection(page, frames, features, chosen)
        _base(page)
        _gate(page, frames[chosen], _gates(features, chosen))
        _layer(page)
    return figure


def _scores(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [4, T] of the frames [T, h, w, 3], each from 0 to its largest = 1, and the frames chosen."""
    from vqlora.frames.scores import score_frames
    from vqlora.frames.select import cumulative

    scores = score_frames(frames)
    features = np.stack([np.asarray(getattr(scores, name), float) for name in FEATURES])
    features /= np.maximum(features.max(axis=1, keepdims=True), 1e-9)
    return features, cumulative(scores.motion, min(CHOSEN, len(frames)))


def _gates(features: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """2σ of fixed weights on features, [chosen + 1, RANKS]; the last row: of the clip's mean features."""
    seen = features[:, chosen].T
    rows = np.concatenate([seen, seen.mean(axis=0, keepdims=True)]) - features.mean(axis=1)
    weights = 4 * np.cos(1.7 * np.outer(np.arange(1, rows.shape[1] + 1), np.arange(1, RANKS + 1)))
    return 2 / (1 + np.exp(-rows @ weights))


def _text(page: Axes, x: float, y: float, words: str, size: float = BODY, **look) -> None:
    page.text(x, y, words, fontsize=size, **({"ha": "center", "va": "center", "color": INK} | look))


def _title(page: Axes, x: float, y: float, words: str) -> None:
    _text(page, x, y, words, size=plt.rcParams["axes.titlesize"], weight="bold", ha="left", va="baseline")


def _arrow(page: Axes, *points: tuple[float, float], colour: str = INK) -> None:
    """A line through the points with a head at the last one."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        page.plot(*zip(start, end, strict=True), color=colour, lw=0.8, solid_capstyle="projecting")
    look = {"arrowstyle": "-|>", "mutation_scale": 6, "lw": 0.8, "color": colour, "shrinkA": 0, "shrinkB": 0}
    page.add_patch(FancyArrowPatch(points[-2], points[-1], **look))


def _box(page: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.05"
    look = {"facecolor": "white", "edgecolor": colour, "linewidth": 1.1}
    page.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, **look))


def _picture(page: Axes, frame: np.ndarray, x: float, y: float, side: float, faded: bool = False) -> None:
    shown = frame if not faded else (0.35 * frame + 0.65 * 255).astype(np.uint8)
    page.imshow(shown, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
    edge = {"edgecolor": "0.75" if faded else "black", "linewidth": 0.4 if faded else 1.1}
    page.add_patch(Rectangle((x, y), side, side, facecolor="none", zorder=3, **edge))
    page.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="auto")


def _cells(page: Axes, values: np.ndarray, x: float, y: float, step: tuple[float, float], cmap: str) -> None:
    """A matrix, first row on top, its lower left corner at (x, y); colours from 0 to twice the middle."""
    height, colours = len(values) * step[1], plt.get_cmap(cmap)
    for (row, column), value in np.ndenumerate(values):
        corner = (x + column * step[0], y + height - (row + 1) * step[1])
        page.add_patch(Rectangle(corner, *step, facecolor=colours(value), edgecolor="white", linewidth=0.5))


def _selection(page: Axes, frames: np.ndarray, features: np.ndarray, chosen: np.ndarray) -> None:
    count, left, top, bottom, height = len(frames), 0.06, 2.86, 2.0, 0.125
    step = 2.0 / count
    _title(page, left, 3.46, "Frame selection")
    _text(page, left, 3.3, r"frames $t = 1, \dots, T$ of clip $b$; $k$ chosen", ha="left")
    for t, frame in enumerate(frames):
        _picture(page, frame, left + t * step, top, step - 0.015, faded=t not in chosen)
    floor = bottom + height * len(features)
    _cells(page, 0.1 + 0.75 * features, left, bottom, (step, height), "Greys")
    for row, name in enumerate(FEATURES.values()):
        _text(page, left + 2.03, floor - (row + 0.5) * height, name, SMALL, ha="left", color=GREY)
    corner = (left + chosen[min(SHOWN, len(chosen) - 1)] * step, bottom)
    page.add_patch(Rectangle(corner, step, floor - bottom, **RING))
    _arrow(page, (corner[0] + step / 2, bottom - 0.02), (corner[0] + step / 2, 1.12))
    _text(page, corner[0] + step / 2 + 0.06, 1.62, "$f_{bt}$", ha="left")
    _arrow(page, (left + 0.14, top - 0.03), (left + 0.14, floor + 0.03))
    _text(page, left + 0.2, (top + floor) / 2, "one pass over\nlow-bit luma", SMALL, ha="left")
    _arrow(page, (left + 1.86, floor + 0.03), (left + 1.86, top - 0.03))
    _text(page, left + 1.8, (top + floor) / 2, "a policy\nchooses", SMALL, ha="right")
    _arrow(page, (left + 2.02, top + step / 2), (BLOCKS["vision"][0] - 0.03, top + step / 2))
    _text(page, left + 2.33, top + step / 2 + 0.09, "$k$ frames", SMALL)


def _base(page: Axes) -> None:
    low, height, bar = 2.68, 0.62, 2.06
    _title(page, BLOCKS["vision"][0], 3.46, "4-bit base, low-rank updates, one budget")
    segment, ends = BLOCKS["vision"][0], [*BLOCKS.values()]
    total = sum(sum(ranks) for *_, ranks in ends)
    span = ends[-1][0] + ends[-1][1] - segment
    for part, (x, width, ranks) in BLOCKS.items():
        colour, share = PARTS[part], span * sum(ranks) / total
        floor = ((segment + share, bar + 0.13), (segment, bar + 0.13))
        funnel = ((x + 0.04, low), (x + width - 0.04, low), *floor)
        page.add_patch(Polygon(funnel, facecolor=colour, alpha=0.13, lw=0))
        page.add_patch(Rectangle((segment, bar), share, 0.13, facecolor=colour, edgecolor="white", lw=0.8))
        segment += share
        _box(page, x, low, width, height, colour)
        _text(page, x + width / 2, low + height - 0.1, NAMES[part], color=colour, weight="bold")
        step = width / (len(ranks) + 0.35)
        for layer, rank in enumerate(ranks):
            foot, tall = (x + (layer + 0.3) * step, low + 0.06), 0.055 * rank
            page.add_patch(Rectangle(foot, 0.1, 0.34, **FROZEN))
            page.add_patch(Rectangle((foot[0] + 0.115, foot[1]), 0.035, tall, facecolor=colour, lw=0))
    for left, right in (("vision", "fusion"), ("fusion", "text")):
        start = BLOCKS[left][0] + BLOCKS[left][1]
        _arrow(page, (start + 0.02, low + height / 2), (BLOCKS[right][0] - 0.02, low + height / 2))
    end = BLOCKS["text"][0] + BLOCKS["text"][1]
    _arrow(page, (end + 0.02, low + height / 2), (end + 0.17, low + height / 2))
    _text(page, end + 0.2, low + height / 2, "caption,\nanswer,\nvector", SMALL, ha="left")
    _arrow(page, (end - 0.1, low + height + 0.13), (end - 0.1, low + height + 0.01))
    _text(page, end - 0.05, low + height + 0.1, "words", SMALL, ha="left")
    page.add_patch(Rectangle((end + 0.14, 2.39), 0.1, 0.1, **FROZEN))
    page.add_patch(Rectangle((end + 0.175, 2.21), 0.035, 0.1, facecolor=GREY, lw=0))
    for y, words in ((2.44, "frozen"), (2.26, r"rank $r_\ell$")):
        _text(page, end + 0.29, y, words, SMALL, ha="left", color=GREY)
    budget = r"rank $r_\ell$ of every layer by its value:  $\sum_\ell r_\ell\,(n_\ell + m_\ell) \leq P$"
    _text(page, BLOCKS["vision"][0] + span / 2, bar - 0.12, budget)


def _gate(page: Axes, frames: np.ndarray, gates: np.ndarray) -> None:
    left, step, side, bottom = 2.58, 0.15, 0.2, 0.36
    top = bottom + side * len(gates)
    _title(page, 0.06, 1.62, "Temporal gate")
    _text(page, 0.06, 1.45, "a frame beside its clip", BODY, ha="left")
    _box(page, 0.95, 0.65, 0.97, 0.43, INK)
    _text(page, 1.435, 0.865, r"$2\,\sigma(\mathrm{MLP}(f_{bt}))$")
    _text(page, 0.87, 0.865, "first layer\nshared in\neach part", SMALL, ha="right", color=GREY)
    _arrow(page, (1.95, 0.865), (2.26, 0.865))
    for row, frame in enumerate(frames):
        _picture(page, frame, left - 0.26, top - (row + 1) * side + 0.01, side - 0.02)
    _text(page, left - 0.07, bottom + side / 2 - 0.02, "words: mean\n$f_{bt}$ of the clip", SMALL, ha="right")
    _cells(page, gates / 2, left, bottom, (step, side), "RdBu_r")
    middle, width = left + step * RANKS / 2, step * RANKS
    _text(page, middle, top + 0.09, "$g$, by rank", SMALL)
    extent = (left, left + width, bottom - 0.13, bottom - 0.06)
    page.imshow(np.linspace(0, 1, 64)[None], cmap="RdBu_r", extent=extent, aspect="auto")
    for x, number in ((left, "0"), (middle, "1"), (left + width, "2")):
        _text(page, x, bottom - 0.2, number, SMALL)
    row = top - (min(SHOWN, len(frames) - 1) + 1) * side
    page.add_patch(Rectangle((left, row), width, side, **RING))
    start, under = (left + width + 0.02, row + side / 2), 0.1
    _arrow(page, start, (3.46, start[1]), (3.46, under), (TIMES, under), (TIMES, 0.47))
    _text(page, TIMES - 0.08, under + 0.09, "$g(f_{bt})$", ha="right")


def _layer(page: Axes) -> None:
    upper, lower, times, plus = 1.28, 0.56, TIMES, 6.02
    _title(page, 3.62, 1.62, "One gated layer")
    _text(page, 3.74, 0.96, "$x$", size=9)
    _text(page, 3.75, 0.84, "row of\nframe $t$", SMALL, va="top", color=GREY)
    page.add_patch(Rectangle((4.54, upper - 0.22), 0.8, 0.44, **FROZEN))
    for y, words, size in ((upper + 0.07, "$W$", 9), (upper - 0.1, "NF4, frozen", SMALL)):
        _text(page, 4.94, y, words, size, bbox={"facecolor": "0.95", "edgecolor": "none", "pad": 0.8})
    _arrow(page, (3.82, 0.96), (3.98, 0.96), (3.98, upper), (4.52, upper))
    _arrow(page, (3.98, 0.96), (3.98, lower), (4.12, lower))
    colour = PARTS["vision"]
    for x, tall, small, name in ((4.14, 0.26, 0.11, "$A$"), (5.24, 0.11, 0.26, "$B$")):
        corners = ((x, lower - tall), (x, lower + tall), (x + 0.5, lower + small), (x + 0.5, lower - small))
        page.add_patch(Polygon(corners, facecolor=colour, linewidth=0))
        _text(page, x + 0.25, lower, name, size=9, color="white")
    _text(page, 4.39, lower + 0.33, r"$n \to r$", SMALL, color=GREY)
    _text(page, 5.49, lower + 0.33, r"$r \to m$", SMALL, color=GREY)
    for x, y, sign in ((times, lower, r"$\odot$"), (plus, upper, "$+$")):
        page.add_patch(Circle((x, y), 0.085, facecolor="white", edgecolor=INK, linewidth=0.8))
        _text(page, x, y, sign, size=8)
    _arrow(page, (4.64, lower), (times - 0.09, lower))
    _arrow(page, (times + 0.09, lower), (5.22, lower))
    _arrow(page, (5.74, lower), (plus, lower), (plus, upper - 0.09))
    _text(page, plus + 0.06, (upper + lower) / 2, r"$\times\, s$", ha="left")
    _arrow(page, (5.36, upper), (plus - 0.09, upper))
    _arrow(page, (plus + 0.09, upper), (6.3, upper))
    _text(page, 6.38, upper, "$y$", size=9)
