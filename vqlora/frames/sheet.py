"""A contact sheet: the score curve of a video, the frames that were chosen by it, and evenly spaced ones."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqlora.frames.api import Selection
from vqlora.frames.reader import stream
from vqlora.frames.select import uniform

_THUMB_PX, _PER_ROW, _MOST = 160, 8, 64
_NAMES = {"motion": "motion (share of white)", "change": "change of low-bit codes",
          "median_distance": "distance to the median frame", "bytes, excess": "bytes above the usual"}


def pictures_of(video: str | Path | np.ndarray, frames: Sequence[int]) -> dict[int, np.ndarray]:
    """Thumbnails uint8 `[h, w, 3]` of at most 160 px by frame number, in one pass over a file."""
    wanted = set(map(int, frames))
    if isinstance(video, np.ndarray):
        source = ((n, video[n] if video.ndim == 4 else np.repeat(video[n][..., None], 3, 2)) for n in wanted)
    else:
        source = ((p.number, p.rgb()) for p in stream(video) if p.number in wanted)
    shrunk = {}
    for number, picture in source:
        step = max(1, -(-max(picture.shape[:2]) // _THUMB_PX))
        shrunk[number] = picture[::step, ::step]
    return shrunk


def draw_sheet(video: str | Path | np.ndarray, selected: Selection, target: str | Path, *,
               title: str = "") -> None:
    """Write a PNG or PDF. Of more than 64 frames an even choice is shown; evenly spaced ones are shown for
    comparison where there is room. Raises ImportError without matplotlib, VideoError, OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown, even = selected.frames, uniform(selected.n_frames, len(selected.frames))
    shown = shown[uniform(len(shown), _MOST)]
    strips = [("chosen", shown), ("even", even)][: 1 if len(shown) > 2 * _PER_ROW else 2]
    pictures = pictures_of(video, np.concatenate([part for _, part in strips]))
    rows = [(label, part[start:start + _PER_ROW]) for label, part in strips
            for start in range(0, len(part), _PER_ROW)]
    columns = min(_PER_ROW, len(shown))
    tall, wide = next(iter(pictures.values())).shape[:2]
    width_in = max(7.0, 1.35 * columns)
    cell_in = (width_in - 0.5) / columns * min(1.6, tall / wide) + 0.28
    figure = Figure(figsize=(width_in, 2.2 + cell_in * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.2, cell_in * len(rows)])
    _draw_curve(upper.subplots(), selected, even)
    name = "" if isinstance(video, np.ndarray) else f"{Path(video).name}, "
    upper.suptitle(title or f"{name}{selected.policy}: {len(selected.frames)} of {selected.n_frames} frames",
                   fontsize=9)
    cells = lower.subplots(len(rows), columns, squeeze=False)
    for axes, (label, part) in zip(cells, rows, strict=True):
        for place, cell in enumerate(axes):
            cell.set_axis_off()
            if place < len(part):
                frame = int(part[place])
                cell.imshow(pictures[frame], interpolation="nearest")
                cell.set_title(f"{label} {frame}\n{selected.times_s[frame]:.2f} s", fontsize=7, pad=2,
                               color="tab:red" if label == "chosen" else "tab:gray")
    figure.savefig(target, metadata={"CreationDate": None} if str(target).endswith(".pdf") else None)


def _draw_curve(axes, selected: Selection, even: np.ndarray) -> None:
    times_s = selected.times_s
    if selected.curve is not None:
        axes.fill_between(times_s, selected.curve, step="mid", color="tab:blue", alpha=0.35, linewidth=0)
        axes.step(times_s, selected.curve, where="mid", color="tab:blue", linewidth=0.8)
    if selected.reached is not None:
        _draw_steps(axes.twinx(), selected)
    axes.plot(times_s[even], np.zeros(len(even)), "^", color="tab:gray", markersize=4, clip_on=False)
    for frame in selected.frames:
        axes.axvline(times_s[frame], color="tab:red", linewidth=1)
    if len(selected.frames) <= 2 * _PER_ROW:
        above = axes.secondary_xaxis("top")
        above.set_xticks(times_s[selected.frames], selected.frames)
        above.tick_params(labelsize=6, colors="tab:red", length=2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(times_s[0], times_s[-1] if len(times_s) > 1 else 1.0)
    steps = "" if selected.reached is None else " at equal steps of the green line"
    axes.set_xlabel(f"seconds (red: frames chosen{steps}; grey marks: evenly spaced)", fontsize=7)
    axes.set_ylabel(_NAMES.get(selected.curve_name, selected.curve_name) or "no score", fontsize=7)
    axes.tick_params(labelsize=6)


def _draw_steps(axes, selected: Selection) -> None:
    """The sum that equal steps were taken of, and the steps: each goes to the line and down to its frame."""
    total, k = selected.reached[-1] or 1.0, len(selected.frames)
    axes.plot(selected.times_s, selected.reached / total, color="tab:green", linewidth=1)
    levels = (2 * np.arange(k) + 1) / (2 * k)
    at = selected.times_s[selected.frames]
    if k <= 2 * _PER_ROW:
        axes.hlines(levels, at, selected.times_s[-1], color="tab:green", linewidth=0.4, linestyle=":")
    axes.plot(at, levels, "o", color="tab:green", markersize=3)
    axes.set_ylabel("share so far", fontsize=7, color="tab:green")
    axes.tick_params(labelsize=6, colors="tab:green")
    axes.set_ylim(0, 1)
