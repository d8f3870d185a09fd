"""Figures of notebook 04: what a step holds, by part; how memory and time grow with frames and rank."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlora.report.cells import MEMORY_COLOURS, ordered, read_csv
from vqlora.report.cost_tables import STEP_ARMS, STEP_PARTS, main_setting, with_parts

LOOKS = {  # arm: colour, marker
    "qlora": ("#0072B2", "^"),
    "lora": ("#56B4E9", "o"),
    "full": ("#D55E00", "D"),
    "vqlora": ("#E69F00", "s"),
    "vqlora+lean": ("#009E73", "v"),
    "vqlora+lean+ckpt": ("#CC79A7", "P"),
}
SHORT = {"qlora": "QLoRA", "lora": "LoRA", "full": "full", "vqlora": "ours,\nplain",
         "vqlora+lean": "ours,\nlean", "vqlora+lean+ckpt": "ours,\nlean,\nckpt"}  # fmt: skip


def step_memory(results: Path) -> Figure:
    """What each method holds at the peak of a step, by part, and its time against plain QLoRA's."""
    runs = read_csv(results, "04_cost/runs.csv", ("model", "arm", "total_bytes", *list(STEP_PARTS)[:-1]))
    ratios = read_csv(results, "04_cost/ratios.csv", ("arm", "against", "what", "median", "low", "high"))
    setting = main_setting(results)
    own = with_parts(runs, setting)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3.2), width_ratios=(1.15, 1))
    places, bottom = np.arange(len(own)), np.zeros(len(own))
    for part, name in STEP_PARTS.items():
        look = {"color": MEMORY_COLOURS[name], "label": name}
        left.bar(places, own[part] / 1e6, 0.7, bottom=bottom, **look)
        bottom += (own[part] / 1e6).to_numpy()
    left.set_xticks(places, [SHORT.get(arm, arm) for arm in own.index], fontsize=6.5)
    left.set(title=f"{setting['model']}, {setting['frames']} frames", ylabel="Memory at the peak (MB)")
    timed = ratios[(ratios["against"] == "qlora") & (ratios["what"] == "cpu_s")]
    timed = timed[(timed[list(setting)] == list(setting.values())).all(axis=1)].set_index("arm")
    for place, arm in enumerate(own.index):
        colour, marker = LOOKS.get(arm, ("0.3", "x"))
        row = timed.loc[arm] if arm in timed.index else {"median": 1.0, "low": 1.0, "high": 1.0}
        ends = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        right.errorbar([place], [row["median"]], yerr=ends, color=colour, marker=marker)
    right.axhline(1.0, color="0.5", lw=0.8)
    right.set_xticks(places, [SHORT.get(arm, arm) for arm in own.index], fontsize=6.5)
    right.set(title="Time", ylabel="Step time over plain QLoRA's", ylim=(0, None))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=6)
    return figure


def step_growth(results: Path) -> Figure:
    """Peak above static and CPU seconds, by frames for each model and by rank; lines are affine fits."""
    columns = ("model", "frames", "rank", "arm")
    table = read_csv(results, "04_cost/runs.csv", (*columns, "peak_bytes"))
    times = read_csv(results, "04_cost/times.csv", (*columns, "round", "cpu_s"))
    fits = read_csv(results, "04_cost/growth.csv", ("along", "model", "arm", "what", "fixed", "each"))
    pairs = list(dict.fromkeys(fits[["along", "model"]].itertuples(index=False, name=None)))
    shown = sorted(pairs, key=lambda pair: pair[0])
    figure, panels = plt.subplots(2, len(shown), figsize=(6.5, 4.4), squeeze=False)
    for column, (along, model) in zip(panels.T, shown, strict=True):
        fitted = fits[(fits["model"] == model) & (fits["along"] == along)]
        other, value = _held(table, model, along)
        drawn = ((column[0], table, "peak_bytes", 1e6), (column[1], times, "cpu_s", 1))
        for panel, frame, what, unit in drawn:
            here = frame[(frame["model"] == model) & (frame[other] == value)]
            _lines(panel, here, fitted[fitted["what"] == what], along, what, unit)
        column[0].set_title(f"{model}, {along}", fontsize=7.5)
        column[1].set_xlabel("frames a clip" if along == "frames" else f"rank, at {value} frames")
    panels[0, 0].set_ylabel("Peak above static (MB)")
    panels[1, 0].set_ylabel("CPU seconds a step")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def _held(table: pd.DataFrame, model: str, along: str) -> tuple[str, int]:
    """What was held while frames or ranks varied, and its value: that which most rows have."""
    other = "rank" if along == "frames" else "frames"
    counts = table[table["model"] == model].groupby(other)[along].nunique()
    return other, int(counts.idxmax())


def _lines(
    panel, frame: pd.DataFrame, fits: pd.DataFrame, along: str, what: str, unit: float
) -> None:
    """Medians with extremes, and the fitted line, for every arm that was fitted."""
    for arm in ordered(fits["arm"], STEP_ARMS):
        colour, marker = LOOKS.get(arm, ("0.3", "x"))
        values = frame[frame["arm"] == arm].groupby(along)[what].agg(["median", "min", "max"]) / unit
        ends = [values["median"] - values["min"], values["max"] - values["median"]]
        look = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 3.5, "elinewidth": 0.6}
        panel.errorbar(values.index, values["median"], yerr=ends, label=STEP_ARMS.get(arm, arm), **look)
        fit = fits[fits["arm"] == arm].iloc[0]
        x = np.array([0, values.index.max()])
        panel.plot(x, (fit["fixed"] + fit["each"] * x) / unit, color=colour, lw=0.8)
    panel.set(xlim=(0, None), ylim=(0, None))


COST_FIGURES = {"step_growth": step_growth, "step_memory": step_memory}
