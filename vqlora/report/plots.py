"""Figures of the paper, from results files to vector PDF and PNG.

Each figure is a pure function of a results folder: ``FIGURES["quality_memory"](results) -> Figure``.
``write_figures`` draws all of them in the style of ``figures/vqlora.mplstyle``. Same results, same bytes: no
date, no software version and no random number enters a file. Colour and marker belong to the method, in every
figure the same.
"""

import io
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg", force=False)

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from vqlora.files import write_atomic  # noqa: E402
from vqlora.report.bit_plots import bits_quality, planner  # noqa: E402
from vqlora.report.cells import ARMS, DOMAINS, METRICS, ordered, read_csv  # noqa: E402
from vqlora.report.cost_plots import COST_FIGURES  # noqa: E402
from vqlora.report.gate_plots import GATE_FIGURES  # noqa: E402
from vqlora.report.general_plots import GENERAL_FIGURES  # noqa: E402
from vqlora.report.keys import ResultsError  # noqa: E402
from vqlora.report.method_figure import method  # noqa: E402
from vqlora.report.qualitative_plots import QUALITATIVE_FIGURES  # noqa: E402
from vqlora.report.rank_plots import RANK_FIGURES  # noqa: E402
from vqlora.report.samples import read_samples  # noqa: E402
from vqlora.report.scaling_plots import SCALING_FIGURES  # noqa: E402

STYLE = Path(__file__).resolve().parents[2] / "figures" / "vqlora.mplstyle"
MARKS = {
    "frozen": ("#000000", "s"),
    "full": ("#D55E00", "D"),
    "lora": ("#56B4E9", "o"),
    "qlora": ("#0072B2", "^"),
}
OTHER = ("#009E73", "v")


def _mark(arm: str) -> tuple[str, str]:
    return MARKS.get(arm, OTHER)


def _wide(frame: pd.DataFrame, domain: str, arm: str, metric: str) -> tuple[float, float, float]:
    rows = frame[(frame["domain"] == domain) & (frame["arm"] == arm) & (frame["metric"] == metric)]
    if rows.empty:
        raise ResultsError(f"03_main/summary.csv: no {metric} for {arm} on {domain}")
    row = rows.iloc[0]
    return float(row["value"]), float(row["low"]), float(row["high"])


def _unit(peak_bytes: float) -> tuple[float, str]:
    return (1e9, "GB") if peak_bytes >= 2e9 else (1e6, "MB")


def quality_memory(results: Path, metric: str = "nll", memory: str = "train_bytes") -> Figure:
    """Quality against memory, a panel a domain: point and 95% interval of every method that trains."""
    frame = read_csv(results, "03_main/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    frame = frame[frame["arm"] != "frozen"]  # no training step, and a loss that would flatten the others
    domains = ordered(frame["domain"], DOMAINS)
    factor, unit = _unit(frame.loc[frame["metric"] == memory, "value"].max())
    figure, panels = plt.subplots(1, len(domains), squeeze=False)
    for panel, domain in zip(panels[0], domains, strict=True):
        for arm in ordered(frame.loc[frame["domain"] == domain, "arm"], ARMS):
            value, low, high = _wide(frame, domain, arm, metric)
            size = _wide(frame, domain, arm, memory)[0] / factor
            colour, marker = _mark(arm)
            error = (
                [[max(value - low, 0)], [max(high - value, 0)]] if np.isfinite([low, high]).all() else None
            )
            panel.errorbar(
                [size],
                [value],
                yerr=error,
                color=colour,
                marker=marker,
                linestyle="none",
                label=ARMS.get(arm, arm),
            )
        panel.set(title=DOMAINS.get(domain, domain), xlabel=f"Memory of a training step ({unit})")
        panel.margins(x=0.18, y=0.12)
        panel.set_xlim(left=0)
    better = "lower" if metric == "nll" else "higher"
    panels[0, 0].set_ylabel(f"{METRICS.get(metric, metric)} on test clips ({better} is better)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


LINES = {  # policy: colour, line, name
    "uniform": ("#000000", "--", "even"),
    "packets": ("#E69F00", "-", "packets"),
    "cumulative-coverage": ("#0072B2", "-", "motion, a fifth even"),
    "segments": ("#CC79A7", "-", "segments"),
    "own-segments": ("#D55E00", "-", "own segments"),
    "top-k": ("#56B4E9", ":", "top-k motion"),
    "oracle": ("#009E73", "--", "oracle"),
}


def frame_policies(results: Path) -> Figure:
    """NLL against the number of frames, a panel a domain, a line a policy; bars: two standard errors of the
    paired difference to even frames."""
    frame = read_csv(results, "07_frames/policies.csv", ("domain", "frames", "policy", "nll", "gain_se"))
    several = frame.groupby("domain")["frames"].nunique() == frame["frames"].nunique()
    domains = ordered(several[several].index, DOMAINS)
    rows = -(-len(domains) // 5)
    figure, panels = plt.subplots(rows, min(5, len(domains)), squeeze=False, sharex=True,
                                  figsize=(6.5, 1.1 + 1.35 * rows))
    for panel in panels.flat[len(domains):]:
        panel.set_axis_off()
    for panel, domain in zip(panels.flat, domains, strict=False):
        for policy, (colour, line, name) in LINES.items():
            own = frame[(frame["domain"] == domain) & (frame["policy"] == policy)].sort_values("frames")
            look = {"color": colour, "linestyle": line, "linewidth": 1.0, "elinewidth": 0.6}
            panel.errorbar(own["frames"], own["nll"], 2 * own["gain_se"].fillna(0), label=name, **look)
        panel.set_title(DOMAINS.get(domain, domain), fontsize=7)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(frame["frames"].unique()), sorted(frame["frames"].unique()), fontsize=6)
        panel.tick_params(axis="y", labelsize=6)
        panel.minorticks_off()
    for row in panels:
        row[0].set_ylabel("NLL")
    for panel in panels[-1]:
        panel.set_xlabel("frames", fontsize=6)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=6.5)
    return figure


def sample_sheet(results: Path, columns: int = 2) -> Figure:
    """One clip a domain: frames evenly spaced in time, a reference caption above them."""
    samples = read_samples(results)
    side, sheet = samples.side, samples.sheet
    rows = samples.rows.assign(line=range(len(samples.rows)))
    rows = rows.set_index("domain").loc[ordered(rows["domain"], DOMAINS)].reset_index()
    lines = -(-len(rows) // columns)
    strip = 6.5 / columns * side / sheet.shape[1]  # height of a strip, inches
    figure, panels = plt.subplots(lines, columns, squeeze=False, figsize=(6.5, lines * (strip + 0.42)))
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, row in zip(panels.T.flat, rows.to_dict("records"), strict=False):
        panel.imshow(samples.strip(row["line"]), interpolation="nearest", aspect="equal")
        panel.vlines(
            np.arange(side, sheet.shape[1], side) - 0.5, -0.5, side - 0.5, color="white", linewidth=1
        )
        caption = textwrap.fill(row["caption"], 66, max_lines=2)
        title = DOMAINS.get(row["domain"], row["domain"])
        for above, text, look in (
            (4 + 7 * len(caption.splitlines()), title, {"fontsize": 7.5, "fontweight": "bold"}),
            (2, caption, {"fontsize": 6.2, "fontstyle": "italic"}),
        ):
            panel.annotate(
                text,
                (0, 1),
                (0, above),
                "axes fraction",
                "offset points",
                va="bottom",
                linespacing=1.05,
                **look,
            )
    return figure


def gates_over_frames(
    frames: np.ndarray, features: pd.DataFrame, gates: Mapping[str, np.ndarray]
) -> Figure:
    """One clip's frames, their features, and the gates of each modality, one column a frame.

    Args:
        frames: uint8 [T, H, W, 3].
        features: a row per frame, a column per standardised feature.
        gates: modality -> [T, n], all gates of its layers; their mean and range are drawn.
    """
    count = len(frames)
    figure, panels = plt.subplots(
        3, 1, figsize=(6.8, 4.6), height_ratios=(0.55, 1.5, 1.5), layout="constrained", sharex=True
    )
    for place, frame in enumerate(frames):
        panels[0].imshow(frame, extent=(place - 0.48, place + 0.48, 0, 1), aspect="auto")
    panels[0].set(xlim=(-0.5, count - 0.5), yticks=[])
    panels[0].grid(False)
    for name, values in features.items():
        panels[1].plot(range(count), values, marker=".", label=str(name).replace("_", " "))
    panels[1].set_ylabel("feature\n(standardised)")
    for modality, values in gates.items():
        line = panels[2].plot(range(count), values.mean(axis=1), marker="o", label=modality)[0]
        panels[2].fill_between(
            range(count), values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.15, lw=0
        )
    panels[2].axhline(1.0, color="0.5", lw=0.8)
    panels[2].set(ylabel="gate\n(mean, range)", xlabel="frame", xticks=range(count))
    for panel in panels[1:]:
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "bits_quality": bits_quality,
    **GATE_FIGURES,
    **GENERAL_FIGURES,
    **QUALITATIVE_FIGURES,
    **RANK_FIGURES,
    **SCALING_FIGURES,
    "frame_policies": frame_policies,
    "quality_memory": quality_memory,
    "method": method,
    "planner": planner,
    "sample_sheet": sample_sheet,
    **COST_FIGURES,
}


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``<stem>.pdf`` and ``<stem>.png`` with bytes that depend on the figure alone."""
    written = []
    for form, metadata in (
        ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
        ("png", {"Software": None}),
    ):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=metadata)
        written.append(write_atomic(Path(f"{stem}.{form}"), buffer.getvalue()))
    return written


def write_figures(results: Path, out: Path, style: Path = STYLE) -> list[Path]:
    """Draw every figure of a results folder into ``<out>/<name>.pdf`` and ``.png``; the files written."""
    written = []
    with plt.style.context(["default", str(style)]):
        for name, draw in sorted(FIGURES.items()):
            figure = draw(Path(results))
            try:
                written += save_figure(figure, Path(out) / name)
            finally:
                plt.close(figure)
    return written
