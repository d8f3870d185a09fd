"""Figures of notebook 05: what gates are worth, what they do over a clip, what each layer follows."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vqlora.report.cells import DOMAINS, label, ordered, read_csv
from vqlora.report.gate_tables import FILE, GATE_NAMES

MARKS = {
    "rank": ("#0072B2", "o"),
    "mixture": ("#009E73", "D"),
    "constant": ("#999999", "s"),
    "shuffled": ("#D55E00", "v"),
    "random": ("#882255", "<"),
    "rank-vision": ("#56B4E9", "o"),
    "rank-text": ("#F0E442", "o"),
    "segments": ("#E69F00", "^"),
    "rank+segments": ("#CC79A7", "P"),
}
OTHER = ("#000000", "x")
PARTS = {"vision": "#0072B2", "fusion": "#009E73", "text": "#D55E00"}
GAPS = {"moving_gap": "Frames in which something moves", "odd_gap": "Spliced-in or degraded frames"}


def gate_gains(results: Path) -> Figure:
    """Gain in NLL over plain adapters with 95% intervals: all arms on the main domains, the gate on all."""
    frame = read_csv(results, FILE, ("domain", "comparison", "value", "low", "high", "margin", "family"))
    frame = frame[frame["comparison"].str.endswith("_vs_plain")]
    frame = frame.assign(arm=frame["comparison"].str.removesuffix("_vs_plain"))
    main = ordered(frame.loc[frame["family"] == "primary", "domain"], DOMAINS)
    panels_of = [(label(name, DOMAINS), frame[frame["domain"] == name], "arm", GATE_NAMES) for name in main]
    panels_of.append(("All domains", frame[frame["arm"] == "rank"], "domain", DOMAINS))
    rows = max(own[by].nunique() for _, own, by, _ in panels_of)
    figure, panels = plt.subplots(
        1, len(panels_of), squeeze=False, figsize=(6.5, 0.75 + 0.2 * rows),
        width_ratios=[1] * len(main) + [1.15],
    )  # fmt: skip
    for panel, (title, own, by, names) in zip(panels[0], panels_of, strict=True):
        shown = ordered(own[by], names)
        for place, name in enumerate(shown):
            row = own[own[by] == name].iloc[0]
            colour, marker = MARKS.get(row["arm"], OTHER)
            ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            ends = ends if np.isfinite(ends).all() else None
            panel.errorbar([row["value"]], [place], xerr=ends, color=colour, marker=marker, markersize=4)
        margin = float(own["margin"].iloc[0])
        panel.axvspan(-margin, margin, color="0.5", alpha=0.12, lw=0)
        panel.axvline(0, color="0.3", lw=0.8)
        panel.set_yticks(range(len(shown)), [label(name, names) for name in shown])
        panel.set(title=title, ylim=(len(shown) - 0.5, -0.5), xlabel="Gain in NLL")
        panel.grid(False, axis="y")
    return figure


def gate_frames(results: Path, clips: int = 2) -> Figure:
    """Gates over the frames of test clips, a mean over the layers of each part; what truly happens is shaded.

    One row a domain that has odd frames, twins left out; a panel a clip.
    """
    frame = read_csv(results, "05_temporal/curves.csv", ("domain", "clip", "frame", "moving", "odd", *PARTS))
    odd = frame.groupby("domain")["odd"].any()
    domains = ordered([name for name in odd.index[odd] if not name.endswith("-twin")], DOMAINS)
    figure, panels = plt.subplots(
        len(domains), clips, squeeze=False, figsize=(6.5, 0.6 + 1.15 * len(domains)), sharey=True
    )
    for row, domain in zip(panels, domains, strict=True):
        own = frame[frame["domain"] == domain]
        for panel in row:
            panel.set_axis_off()
        for panel, (_, clip) in zip(row, own.groupby("clip"), strict=False):
            panel.set_axis_on()
            _clip(panel, clip.sort_values("frame"))
            panel.set_title(label(domain, DOMAINS), fontsize=7.5)
        row[0].set_ylabel("gate")
    for panel in panels[-1]:
        panel.set_xlabel("frame of the clip")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _clip(panel, clip: pd.DataFrame) -> None:
    for column, colour, name in (("moving", "#F0E442", "something moves"), ("odd", "0.6", "odd frame")):
        for place, number in enumerate(clip.loc[clip[column], "frame"]):
            look = {"color": colour, "alpha": 0.45, "lw": 0}
            panel.axvspan(number - 0.5, number + 0.5, label=None if place else name, **look)
    shown = clip.dropna(subset=list(PARTS))
    for part, colour in PARTS.items():
        panel.plot(shown["frame"], shown[part], color=colour, marker="o", markersize=3, lw=1, label=part)
    panel.axhline(1, color="0.4", lw=0.6)
    panel.set_xlim(-0.5, clip["frame"].max() + 0.5)
    panel.grid(False)


def gate_layers(results: Path, arm: str = "rank") -> Figure:
    """How much more each layer's gate opens in frames of a kind than in the others, a row a domain."""
    columns = ("domain", "arm", "place", "modality", *GAPS)
    frame = read_csv(results, "05_temporal/gates.csv", columns)
    frame = frame[frame["arm"] == arm]
    starts = frame.drop_duplicates("place").sort_values("place").drop_duplicates("modality")
    middles = frame.groupby("modality")["place"].mean()
    top = float(np.nanmax(np.abs(frame[list(GAPS)].to_numpy()))) or 1.0
    means = frame.groupby(["domain", "place"])[list(GAPS)].mean()
    tables = {name: means[name].unstack().dropna(how="all") for name in GAPS}
    tables = {name: table.loc[ordered(table.index, DOMAINS)] for name, table in tables.items() if len(table)}
    heights = [len(table) for table in tables.values()]
    size = {"figsize": (6.5, 1.0 + 0.16 * sum(heights)), "height_ratios": heights}
    figure, panels = plt.subplots(len(tables), 1, squeeze=False, sharex=True, **size)
    look = {"cmap": "RdBu_r", "vmin": -top, "vmax": top, "rasterized": True, "cbar": False}
    for panel, (name, table) in zip(panels[:, 0], tables.items(), strict=True):
        sns.heatmap(table.rename(index=lambda domain: label(domain, DOMAINS)), ax=panel, **look)
        panel.set(title=GAPS[name], xlabel="", ylabel="")
        panel.set_xticks(middles + 0.5, middles.index, rotation=0)
        for place in starts["place"][1:]:
            panel.axvline(place, color="black", lw=0.8)
    figure.colorbar(panels[0, 0].collections[0], ax=panels[:, 0], label="gate, less the others")
    return figure


GATE_FIGURES = {"gate_frames": gate_frames, "gate_gains": gate_gains, "gate_layers": gate_layers}
