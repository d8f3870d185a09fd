"""Figures of notebook 10: loss against size with the laws fitted to it, and loss against what it costs."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlora.report.cells import DOMAINS, label, ordered, read_csv
from vqlora.report.scaling_tables import (
    ARM_NAMES,
    AXES,
    CURVES,
    FOLDER,
    MIXED,
    RECIPES,
    distinct,
    fitted,
    size_name,
)

LOOKS = {"language": ("#0072B2", "o"), "visual": ("#D55E00", "s"), "targets": ("#009E73", "D"),
         "source": ("#CC79A7", "^")}  # fmt: skip
OTHER = ("#000000", "v")
COSTS = {  # column: title, divisor
    "train_bytes": ("Memory of a step (MB)", 1e6),
    "step_flops": ("GFLOP of a step", 1e9),
    "trainable_parameters": ("Trainable parameters", 1.0),
}
ORIGINS = {  # notebook, or the further methods of 03: colour, marker, what its arms are
    "03_main": ("#000000", "s", "full, LoRA, QLoRA"),
    "03_more": ("#009E73", "v", "further methods"),
    "06_ranks": ("#0072B2", "o", "allocations at one budget"),
    "08_bits": ("#CC79A7", "D", "LoRA by bits"),
    "09_rank_size_and_placement": ("#D55E00", "^", "sizes of rank, single parts"),
}


def scaling_fits(results: Path) -> Figure:
    """A panel an axis: losses with 95% intervals, the law (line), what it foretells unseen (open marker)."""
    points = read_csv(results, f"{FOLDER}/points.csv", ("axis", "domain", "x", "value", "low", "high"))
    fits, axes, names = fitted(results), ordered(points["axis"], AXES), {}
    figure, panels = plt.subplots(1, len(axes), squeeze=False, figsize=(6.5, 2.5))
    for panel, axis in zip(panels[0], axes, strict=True):
        own = points[points["axis"] == axis]
        for domain in ordered(own["domain"], CURVES):
            curve = own[own["domain"] == domain].sort_values("x")
            law = fits[(fits["axis"] == axis) & (fits["domain"] == domain)]
            names[domain] = _curve(panel, curve, law, domain)
        panel.set(title=textwrap.fill(label(axis, AXES), 12), xscale="log")
        panel.set_xticks(*_sizes(own["x"]), fontsize=5.5)
        panel.minorticks_off()
        panel.tick_params(axis="y", labelsize=6.5)
        panel.title.set_fontsize(7.5)
    panels[0, 0].set_ylabel("NLL (lower is better)")
    order = ordered(list(names), CURVES)
    figure.legend([names[name] for name in order], [label(name, CURVES) for name in order],
                  loc="outside lower center", ncols=len(order))  # fmt: skip
    return figure


def _sizes(x: pd.Series) -> tuple[list[float], list[str]]:
    """A tick at each size, named unless the next name would touch it."""
    ticks, names, last = sorted(x.unique(), reverse=True), [], np.inf
    apart = 0.22 * np.log(max(x) / min(x))
    for size in ticks:
        shown = np.log(last / size) > apart
        names.append(size_name(size) if shown else "")
        last = size if shown else last
    return ticks, names


def _curve(panel, curve: pd.DataFrame, law: pd.DataFrame, domain: str):
    colour, marker = LOOKS.get(domain, OTHER)
    ends = np.array([curve["value"] - curve["low"], curve["high"] - curve["value"]])
    ends = np.nan_to_num(np.clip(ends, 0, None))
    look = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.5, "elinewidth": 0.8}
    drawn = panel.errorbar(curve["x"], curve["value"], yerr=ends, **look)
    if len(law):
        told = law.set_index("metric")["value"]
        floor, slope, power = (float(told[name]) for name in ("floor_nll", "slope", "exponent"))
        x = np.geomspace(curve["x"].min(), curve["x"].max(), 80)
        panel.plot(x, floor + slope * x**-power, color=colour, lw=1)
        unseen = {"marker": marker, "markerfacecolor": "white", "markeredgecolor": colour, "markersize": 7.5}
        foretold = [float(told["foretold_nll"])]
        panel.plot([curve["x"].max()], foretold, linestyle="none", zorder=1.5, **unseen)
    return drawn


def pareto(results: Path) -> Figure:
    """Loss against memory, FLOPs and trainable parameters; a row a domain and recipe, fronts as lines.

    An open marker has one seed.
    """
    columns = ("recipe", "domain", "notebook", "arm", "seeds", "nll", *COSTS)
    frame = distinct(read_csv(results, f"{FOLDER}/pareto.csv", columns))
    pairs = [(domain, recipe) for domain in ordered(frame["domain"], DOMAINS)
             for recipe in ordered(frame["recipe"], RECIPES)
             if ((frame["domain"] == domain) & (frame["recipe"] == recipe)).any()]  # fmt: skip
    height = min(0.7 + 1.75 * len(pairs), 8.3)  # inches, of a page with its caption
    figure, panels = plt.subplots(len(pairs), len(COSTS), squeeze=False, sharey="row", figsize=(6.5, height))
    handles: dict[str, object] = {}
    tall = 40 * (height - 0.7) / len(pairs)  # of a panel, in points
    for row, (domain, recipe) in zip(panels, pairs, strict=True):
        own = frame[(frame["domain"] == domain) & (frame["recipe"] == recipe)]
        fronts = [own[own[f"front_{cost}"]].sort_values([cost, "nll"], ascending=[True, False])
                  for cost in COSTS]  # fmt: skip
        names, ends = _names([front["nll"] for front in fronts], own["nll"].max(), tall)
        for panel, (cost, (title, divisor)), front, at in zip(row, COSTS.items(), fronts, names, strict=True):
            _scatter(panel, own.assign(cost=own[cost] / divisor), handles)
            cheap, dear = own[cost].min() / divisor, own[cost].max() / divisor
            panel.step(front[cost] / divisor, front["nll"], where="post", color="0.6", lw=0.9, zorder=1)
            for arm, x, y in zip(front["arm"], front[cost] / divisor, at, strict=True):
                look = {"fontsize": 5, "ha": "right", "va": "center", "textcoords": "offset points"}
                panel.annotate(_short(arm), (x, y), (-3.5, -0.5), **look)
            panel.set(xscale="log", yscale="log", ylim=ends)
            panel.minorticks_off()
            panel.set_xticks(*_ticks(cheap, dear))
            panel.set_yticks(*_ticks(own["nll"].min(), own["nll"].max()))
            panel.margins(x=0.08)
            panel.set_xlim(left=cheap * (cheap / dear) ** 0.95)
            panel.set_xlabel(title, fontsize=6.5, labelpad=1)
            panel.tick_params(labelsize=6)
        row[0].set_title(f"{label(domain, DOMAINS)}, {RECIPES[recipe]}", fontsize=7.5)
        row[0].set_ylabel("NLL", fontsize=7)
    named = [words for *_, words in ORIGINS.values() if words in handles]
    shown = [handles[words] for words in named]
    figure.legend(shown, named, loc="outside lower center", ncols=5, fontsize=6.5)
    return figure


def _short(arm: str) -> str:
    """The name of an arm as far as its first comma, but for mixed bits, which begin like the plain ones."""
    words = label(arm, ARM_NAMES).replace("\\%", "%").split(", ")
    return words[-1] if arm in MIXED else words[0]


def _ticks(low: float, high: float) -> tuple[np.ndarray, list[str]]:
    """Three ticks with plain numbers: the ends and the middle of what is shown."""
    marks = np.unique([float(f"{x:.2g}") for x in np.geomspace(low, high, 3)])
    return marks, [f"{x / 1e3:,.0f}k" if x >= 1e4 else f"{x:,.0f}" if x >= 10 else f"{x:g}" for x in marks]


def _names(fronts: list[pd.Series], top: float, tall: float) -> tuple[list[list[float]], tuple[float, float]]:
    """Where names of the arms on fronts stand, on a log scale of loss that all fronts share, and its ends.

    To the left of a front there is nothing. A name stands beside its arm, or as far below it as names above
    ask for; the scale reaches down to the last.

    fronts: losses from the worst down; top: largest loss shown; tall: of a panel, in points.
    """
    low = min(front.min() for front in fronts)
    reach = max(np.log(top / low), 1e-3)
    for _ in range(20):  # more room makes names smaller on the scale
        found = []
        for front in fronts:
            at, own = np.inf, []
            for loss in np.log(front):
                at = min(loss, at - 6 * reach / tall)
                own.append(at)
            found.append(own)
        floor = min(at for own in found for at in own)
        reach = 0.5 * reach + 0.5 * 1.15 * (np.log(top) - floor)
    ends = (np.exp(floor - 0.07 * reach), np.exp(np.log(top) + 0.08 * reach))
    return [np.exp(own).tolist() for own in found], ends


def _scatter(panel, own: pd.DataFrame, handles: dict) -> None:
    for row in own.to_dict("records"):
        colour, marker, words = ORIGINS[row["notebook"]]
        face = "white" if row["seeds"] == 1 else colour
        look = {"marker": marker, "color": colour, "markerfacecolor": face, "linestyle": "none"}
        handles.setdefault(words, panel.plot([row["cost"]], [row["nll"]], markersize=3.5, **look)[0])


SCALING_FIGURES = {"pareto": pareto, "scaling_fits": scaling_fits}
