"""Figures of notebook 08: quality by bits, and the memory planner against measurements."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlora.report.bit_tables import PART_NAMES
from vqlora.report.cells import DOMAINS, MEMORY_COLOURS, ordered, read_csv

FAMILIES = {  # beginning of a label: colour, marker, name
    "random": ("#999999", "x", "kept in 16 bits at random"),
    "mixed": ("#009E73", "^", "kept in 16 bits by expected harm"),
    "int3": ("#D55E00", "v", "simulated"),
    "int2": ("#D55E00", "v", "simulated"),
    "": ("#0072B2", "o", "one kind of bits"),
}
BESIDE = {  # points from the marker: where a name has neighbours
    "nf4": (3, -9),
    "int8": (3, -9),
    "int3": (-13, 5),
    "mixed-25": (-18, 5),
}
MODELS = {"KineVLM": ("#0072B2", "o"), "SmolVLM-135M": ("#D55E00", "s")}
STACK = tuple(part for part in PART_NAMES if part not in ("peak", "resident"))


def bits_quality(results: Path) -> Figure:
    """NLL of the frozen base on its source against the memory of its weights, and of tuned models by bits."""
    frame = read_csv(results, "08_bits/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    held = frame[(frame["domain"] == "held") & (frame["metric"] == "weight_bytes")].set_index("arm")["value"]
    nll = frame[frame["metric"] == "nll"].astype({"value": float})
    tuned = [name for name in ordered(nll["domain"], DOMAINS) if name != "source"]
    widths = (1.9, *(1 for _ in tuned))
    figure, panels = plt.subplots(1, len(widths), figsize=(6.5, 3.0), width_ratios=widths, squeeze=False)
    panels = panels[0]
    _frozen(panels[0], nll[nll["domain"] == "source"].set_index("arm")["value"], held.astype(float) / 1e6)
    for panel, domain in zip(panels[1:], tuned, strict=True):
        own = nll[nll["domain"] == domain].set_index("arm")
        names = list(own.index.intersection([*held.index], sort=False))
        names = sorted(names, key=lambda name: -float(held[name]))
        for place, name in enumerate(names):
            row, (colour, marker, _) = own.loc[name], _family(name)
            ends = [[max(row["value"] - row["low"], 0)], [max(row["high"] - row["value"], 0)]]
            look = {"color": colour, "marker": marker, "markersize": 4}
            panel.errorbar([place], [row["value"]], yerr=ends if np.isfinite(ends).all() else None, **look)
        panel.set_xticks(range(len(names)), map(_short, names), rotation=60)
        panel.set(title=f"{DOMAINS[domain]}, tuned", xlim=(-0.5, len(names) - 0.5))
    return figure


def _frozen(panel, nll: pd.Series, held_mb: pd.Series) -> None:
    seen = set()
    for family in ("random", "mixed"):
        line = sorted((held_mb[name], nll[name]) for name in nll.index if name.startswith(family))
        panel.plot(*zip(*line, strict=True), color=FAMILIES[family][0], lw=0.8) if line else None
    for name, value in nll.items():
        colour, marker, words = _family(name)
        look = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 4}
        panel.plot([held_mb[name]], [value], label=None if words in seen else words, **look)
        seen.add(words)
        if not name.startswith("random"):
            place = BESIDE.get(name, (3, 4))
            look = {"textcoords": "offset points", "fontsize": 6}
            panel.annotate(_short(name), (held_mb[name], value), place, **look)
    panel.margins(y=0.1)
    panel.set(title="Source, frozen", xlabel="Memory of the weights (MB)", ylabel="NLL (lower is better)")
    panel.legend(fontsize=6)


def _short(name: str) -> str:
    """``mixed-25`` -> mixed 25%."""
    share = f"{name.replace('-', ' ')}%" if "-" in name else name
    return {"bf16": "16 bits", "nf4": "NF4", "fp4": "FP4"}.get(name, share)


def _family(name: str) -> tuple[str, str, str]:
    return next(look for beginning, look in FAMILIES.items() if name.startswith(beginning))


def planner(results: Path) -> Figure:
    """Peaks predicted and measured, a tenth on either side; what they are made of, planned and measured."""
    peaks = read_csv(results, "08_bits/peaks.csv", ("model", "training_predicted_mb", "training_measured_mb"))
    parts = read_csv(results, "08_bits/parts.csv", ("model", "held", "phase", "part", "measured_bytes"))
    parts = parts[parts["phase"] == "training"]
    models = list(dict.fromkeys(parts["model"]))
    widths = (1.3, *(1 for _ in models))
    figure, panels = plt.subplots(1, len(widths), figsize=(6.5, 3.2), width_ratios=widths, squeeze=False)
    panels = panels[0]
    left, measured = panels[0], peaks.filter(like="measured")
    for model, (colour, marker) in MODELS.items():
        own = peaks[peaks["model"] == model]
        for title, fill in (("training", colour), ("generation", "white")):
            look = {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": "none"}
            found = (own[f"{title}_{kind}_mb"] for kind in ("measured", "predicted"))
            left.plot(*found, label=f"{model}, {title}", markersize=4, **look)
    ends = np.array([measured.min().min() / 1.3, measured.max().max() * 1.3])
    left.plot(ends, ends, color="0.4", lw=0.8)
    left.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.5", alpha=0.2, lw=0)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=f"{len(peaks)} settings")
    left.set(xlabel="Measured peak (MB)", ylabel="Predicted peak (MB)")
    left.legend(fontsize=6, loc="upper left", handletextpad=0.1, borderaxespad=0.1)
    for panel, model in zip(panels[1:], models, strict=True):
        _stack(panel, parts[parts["model"] == model], model)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=6)
    return figure


def _stack(panel, parts: pd.DataFrame, model: str) -> None:
    """Bars in pairs: planned (left) and measured (right) for each way of holding the base."""
    ways = list(dict.fromkeys(parts["held"]))
    for kind, shift in (("predicted_bytes", -0.2), ("measured_bytes", 0.2)):
        wide = parts.pivot(index="part", columns="held", values=kind).reindex(STACK)[ways].fillna(0) / 1e6
        bottom = np.zeros(len(ways))
        for part, sizes in wide.iterrows():
            name = PART_NAMES[part]
            look = {"color": MEMORY_COLOURS[name], "label": name if shift > 0 else None}
            panel.bar(np.arange(len(ways)) + shift, sizes, 0.36, bottom=bottom, **look)
            bottom += sizes.to_numpy()
    panel.set_xticks(range(len(ways)), ways)
    panel.set(title=model, ylabel="MB: planned, measured")
