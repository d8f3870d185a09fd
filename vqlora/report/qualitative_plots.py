"""Figures of notebook 12: captions and retrievals with their frames, attention, gates and ranks in time."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vqlora.report.cells import DOMAINS, SHORT, label, ordered, read_csv
from vqlora.report.keys import ResultsError

NOTEBOOK = "12_qualitative"
PARTS = {"vision": "#0072B2", "fusion": "#009E73", "text": "#D55E00"}
RIGHT, WRONG = "#009E73", "#D55E00"
HAPPENS = {"moving": ("#F0E442", "something moves"), "aside": ("0.6", "spliced in")}
KINDS = {"object": "name", "motion": "verb", "aside": "spliced-in name"}


def _rows_of(results: Path, name: str, count: int) -> list[np.ndarray]:
    """The strips of `<name>.png`, `count` below each other."""
    path = Path(results) / NOTEBOOK / f"{name}.png"
    if not path.is_file():
        raise ResultsError(f"{path}: missing; `make 12` writes it")
    sheet = plt.imread(path)
    if sheet.shape[0] % count:
        raise ResultsError(f"{path}: {sheet.shape[0]} pixel rows do not divide into {count} strips")
    return np.split(sheet, count)


def _strip(panel, picture: np.ndarray, colour: str | None = None) -> None:
    panel.imshow(picture, interpolation="nearest", aspect="equal")
    side, width = picture.shape[:2]
    panel.vlines(np.arange(side, width, side) - 0.5, -0.5, side - 0.5, color="white", linewidth=1)
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    for edge in panel.spines.values():
        edge.set(visible=colour is not None, color=colour, linewidth=1.6)


def caption_cases(results: Path) -> Figure:
    """Clips at quantiles of the NLL: their frames, the reference, and what each arm says."""
    columns = ("picture", "domain", "quantile", "arm", "reference", "caption", "faults")
    frame = read_csv(results, f"{NOTEBOOK}/captions.csv", columns)
    shown = frame["picture"].drop_duplicates().sort_values()
    strips = _rows_of(results, "captions", len(shown))
    size = (6.5, 0.1 + 0.72 * len(shown))
    figure, panels = plt.subplots(len(shown), 2, squeeze=False, figsize=size, width_ratios=(1, 1.15))
    for (left, right), picture in zip(panels, shown, strict=True):
        own = frame[frame["picture"] == picture]
        first = own.iloc[0]
        _strip(left, strips[int(picture)])
        title = f"{label(first['domain'], DOMAINS)}, {round(100 * first['quantile'])}% quantile"
        left.set_title(title, fontsize=6.5, pad=2)
        right.set_axis_off()
        lines = [("truth", textwrap.shorten(first["reference"], 104, placeholder=" ..."), "black")]
        for arm in ordered(own["arm"], SHORT):
            row = own[own["arm"] == arm].iloc[0]
            good = row["faults"] == "none"
            faults = "" if good else f" [{row['faults']}]"
            said = textwrap.shorten(str(row["caption"]), 104 - len(faults), placeholder=" ...") + faults
            lines.append((label(arm, SHORT), said, RIGHT if good else WRONG))
        step = 1.3 / len(lines)
        for place, (name, text, colour) in enumerate(lines):
            at = 1.15 - place * step
            look = {"transform": right.transAxes, "fontsize": 5.2, "va": "top"}
            right.text(0, at, name, weight="bold", **look)
            right.text(0.115, at, text, color=colour, **look)
    return figure


def retrieval_cases(results: Path) -> Figure:
    """For each query the first clips that were found; the right one is framed in green."""
    columns = ("picture", "query", "clip", "rank", "place", "caption", "right")
    frame = read_csv(results, f"{NOTEBOOK}/retrieval.csv", columns)
    strips = _rows_of(results, "retrieval", len(frame))
    queries = frame.sort_values("picture").drop_duplicates("clip")
    top = int(frame["place"].max())
    size = (6.5, 1.02 * len(queries))
    figure, panels = plt.subplots(len(queries), top, squeeze=False, figsize=size)
    for row, query in zip(panels, queries.to_dict("records"), strict=True):
        own = frame[frame["clip"] == query["clip"]].sort_values("place")
        for panel, found in zip(row, own.to_dict("records"), strict=True):
            _strip(panel, strips[found["picture"]], RIGHT if found["right"] else "0.8")
            panel.set_xlabel(textwrap.fill(found["caption"], 48, max_lines=2), fontsize=5.2, labelpad=2)
        text = textwrap.shorten(query["query"], 110, placeholder=" ...")
        title = f"“{text}”: right clip at rank {query['rank']}"
        row[0].set_title(" ", fontsize=6.5, pad=3)           # keeps its height free
        # wider than its panel, so that the layout must not see it
        look = {"fontsize": 6.5, "fontweight": "bold", "annotation_clip": False}
        written = row[0].annotate(title, (0, 1), (0, 3), "axes fraction", "offset points", **look)
        written.set_in_layout(False)
    return figure


def attention_case(results: Path) -> Figure:
    """Left: attention of each word of a caption to the frames shown and their four cells, boxes where its
    event is seen. Right: what each kind of word gives to its own event, and to those of other clips."""
    columns = ("place", "word", "kind", "shown", "frame", "cell", "weight", "here")
    frame = read_csv(results, f"{NOTEBOOK}/attention.csv", columns)
    frame = frame.sort_values(["place", "shown", "cell"])
    words = frame.drop_duplicates("place")
    frames, side = frame["shown"].nunique(), round(frame["cell"].nunique() ** 0.5)
    grid = frame["weight"].to_numpy().reshape(len(words), frames, side, side)
    wide = grid.transpose(0, 2, 1, 3).reshape(len(words) * side, frames * side)
    figure = plt.figure(figsize=(6.5, max(2.4, 0.85 + 0.2 * len(words))))
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1))
    above, panel = left.subplots(2, 1, height_ratios=(1, 0.26 * len(words)))
    _strip(above, _rows_of(results, "attention", 1)[0])
    above.set_aspect("auto")
    extent = (-0.5, frames - 0.5, len(words) - 0.5, -0.5)
    shown = panel.imshow(wide, cmap="viridis", vmin=0, extent=extent, aspect="auto", interpolation="nearest")
    for row, (_, own) in enumerate(frame.groupby("place", sort=False)):
        for place in own.loc[own["here"], "shown"].unique():
            panel.add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", lw=1.1))
    panel.set_yticks(range(len(words)), words["word"], fontsize=6.5)
    panel.set_xticks(range(frames), frame.drop_duplicates("shown")["frame"])
    panel.set_xlabel("frame of the clip")
    panel.grid(False)
    left.colorbar(shown, ax=panel, label="share", fraction=0.05, pad=0.02)
    panel = right.subplots()
    _looks(panel, read_csv(results, f"{NOTEBOOK}/looks.csv", ("model", "kind", "what", "metric", "value")))
    right.legend(*panel.get_legend_handles_labels(), loc="outside upper center", fontsize=6)
    return figure


def _looks(panel, frame: pd.DataFrame) -> None:
    cells = frame[frame["model"] == "tuned"].set_index(["what", "kind", "metric"])
    rows = [(what, kind) for what in ("frames", "cell") for kind in KINDS
            if (what, kind, "share_frac") in cells.index]  # fmt: skip
    looks = {
        "share_frac": ("#0072B2", "o", "its own event"),
        "others_frac": ("0.55", "s", "those of other clips"),
        "even_frac": ("black", "|", "an even share"),
    }
    for metric, (colour, marker, name) in looks.items():
        for place, key in enumerate(rows):
            row = cells.loc[(*key, metric)]
            ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            ends = ends if np.isfinite(ends).all() and metric != "even_frac" else None
            panel.errorbar([row["value"]], [place], xerr=ends, color=colour, marker=marker, markersize=4,
                           linestyle="none", label=None if place else name)  # fmt: skip
    names = [f"{KINDS[kind]}, {what}" for what, kind in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=6)
    panel.set(ylim=(len(rows) - 0.4, -0.6), xlabel="share of attention")
    panel.set_xlim(left=0)
    panel.grid(False, axis="y")


def gate_timeline(results: Path) -> Figure:
    """Two clips: their frames, and below each, at its time, gates and effective ranks of the parts."""
    columns = ("clip", "frame", "shown", "moving", "aside")
    frame = read_csv(results, f"{NOTEBOOK}/timeline.csv", columns)
    clips = sorted(frame["clip"].unique())
    strips = _rows_of(results, "timeline", len(clips))
    size = {"figsize": (6.5, 2.9), "height_ratios": (0.62, 1, 1)}
    figure, panels = plt.subplots(3, len(clips), squeeze=False, sharex="col", sharey="row", **size)
    for column, (clip, strip) in enumerate(zip(clips, strips, strict=True)):
        own = frame[frame["clip"] == clip].sort_values("frame")
        seen = own[own["shown"]]
        _above(panels[0, column], strip, seen["frame"].to_numpy(), int(own["frame"].max()))
        for row, (head, name) in enumerate((("gate", "gate"), ("rank", "effective rank")), start=1):
            panel = panels[row, column]
            for what, (colour, said) in HAPPENS.items():
                for place, number in enumerate(own.loc[own[what], "frame"]):
                    panel.axvspan(number - 0.5, number + 0.5, color=colour, alpha=0.45, lw=0,
                                  label=None if place else said)  # fmt: skip
            for part, colour in PARTS.items():
                look = {"color": colour, "marker": "o", "markersize": 3, "lw": 1, "label": part}
                panel.plot(seen["frame"], seen[f"{head}_{part}"], **look)
            panel.grid(False)
            if not column:
                panel.set_ylabel(name)
        panels[2, column].set_xlabel("frame of the clip")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _above(panel, strip: np.ndarray, numbers: np.ndarray, last: int) -> None:
    """Each frame above its own time."""
    side, gap = strip.shape[0], float(np.diff(numbers).min()) if len(numbers) > 1 else 1.0
    for place, number in enumerate(numbers):
        picture = strip[:, place * side : (place + 1) * side]
        panel.imshow(picture, extent=(number - 0.48 * gap, number + 0.48 * gap, 0, 1), aspect="auto")
    panel.set(xlim=(-0.5, last + 0.5), ylim=(0, 1), yticks=[])
    panel.tick_params(axis="x", length=0, labelbottom=False)
    panel.grid(False)
    for edge in panel.spines.values():
        edge.set_visible(False)


QUALITATIVE_FIGURES = {
    "attention_case": attention_case,
    "caption_cases": caption_cases,
    "gate_timeline": gate_timeline,
    "retrieval_cases": retrieval_cases,
}
