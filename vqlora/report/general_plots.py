"""Figure of notebook 11: other domains, other languages, other numbers of frames."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from vqlora.experiments.general import LANGUAGES
from vqlora.report.cells import DOMAINS, label, ordered, read_csv
from vqlora.report.general_tables import COLUMNS, FILE, TRAINED

MARKS = {"frozen": ("#000000", "s"), "language": ("#D55E00", "o"), "visual": ("#0072B2", "^")}
LEARNED = {
    "frozen": ("frozen", "#000000", "s"),
    "joint": ("English", "#0072B2", "^"),
    "alone": ("the language alone", "#009E73", "D"),
    "together": ("all languages", "#CC79A7", "v"),
}
OTHER = ("#E69F00", "P")


def general_reach(results: Path) -> Figure:
    """NLL with 95% intervals: of what was tuned elsewhere, of captions by language, by number of frames."""
    frame = read_csv(results, FILE, COLUMNS)
    frame = frame[frame["metric"] == "nll"]
    figure, panels = plt.subplots(1, 3, figsize=(6.5, 2.6), width_ratios=(1.15, 1.15, 1))
    _domains(panels[0], frame)
    _languages(panels[1], frame)
    _frames(panels[2], frame)
    panels[0].set_ylabel("NLL on test clips")
    return figure


def _point(panel, place: float, row: pd.Series, colour: str, marker: str, name: str | None) -> None:
    error = [[max(row["value"] - row["low"], 0)], [max(row["high"] - row["value"], 0)]]
    look = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none"}
    panel.errorbar([place], [row["value"]], yerr=error, label=name, **look)


def _log(panel) -> None:
    """A logarithmic axis with plain numbers on it."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    ticks = [tick for tick in (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20) if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()


def _domains(panel, frame: pd.DataFrame) -> None:
    """One column a domain that is read, one mark a domain that was learned."""
    frame = frame[frame["arm"].isin(("frozen", "joint"))]
    own = frame[frame["reading"] == "own"].assign(on=lambda rows: rows["trained"])
    far = frame[frame["reading"].str.startswith("domain.")]
    far = far.assign(on=far["reading"].str.removeprefix("domain."))
    frame = pd.concat([own, far])
    frame["learned"] = frame["trained"].where(frame["arm"] == "joint", "frozen")
    frame = frame.drop_duplicates(["on", "learned"])
    domains, arms = ordered(frame["on"], DOMAINS), ordered(frame["learned"], TRAINED)
    for shift, arm in enumerate(arms):
        rows = frame[frame["learned"] == arm].set_index("on")
        for place, domain in enumerate(name for name in domains if name in rows.index):
            colour, marker = MARKS.get(arm, OTHER)
            at = domains.index(domain) + 0.22 * (shift - (len(arms) - 1) / 2)
            _point(panel, at, rows.loc[domain], colour, marker, None if place else label(arm, TRAINED))
    panel.set_xticks(range(len(domains)), [label(name, DOMAINS).replace(" ", "\n") for name in domains])
    panel.set(title="Other domains")
    _log(panel)
    panel.legend(loc="best", fontsize=6.5)
    panel.grid(False, axis="x")


def _languages(panel, frame: pd.DataFrame) -> None:
    frame = frame[frame["reading"].str.startswith("language.")]
    frame = frame.assign(language=frame["reading"].str.removeprefix("language."))
    alone = frame["arm"] == frame["language"]
    frame = frame.assign(learned=frame["arm"].where(~alone, "alone"))
    frame = frame[frame["learned"].isin(LEARNED)]
    languages = ordered(frame["language"], LANGUAGES)
    for shift, (arm, (name, colour, marker)) in enumerate(LEARNED.items()):
        rows = frame[frame["learned"] == arm].drop_duplicates("language").set_index("language")
        for place, language in enumerate(one for one in languages if one in rows.index):
            at = languages.index(language) + 0.18 * (shift - 1.5)
            _point(panel, at, rows.loc[language], colour, marker, None if place else name)
    panel.set_xticks(range(len(languages)), [label(name, LANGUAGES) for name in languages], rotation=20)
    panel.set(title="Other languages")
    _log(panel)
    panel.legend(loc="best", fontsize=6.5)
    panel.grid(False, axis="x")


def _frames(panel, frame: pd.DataFrame) -> None:
    count = frame["reading"].where(frame["reading"] != "own", "frames.8")
    frame = frame[count.str.startswith("frames.")].assign(count=count)
    frame["count"] = frame["count"].str.removeprefix("frames.").astype(int)
    frame = frame[frame["arm"] == "joint"]
    for domain in ordered(frame["trained"], DOMAINS):
        rows = frame[frame["trained"] == domain].sort_values("count")
        colour, marker = MARKS.get(domain, OTHER)
        error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        look = {"color": colour, "marker": marker, "markersize": 4, "label": label(domain, DOMAINS)}
        panel.errorbar(rows["count"], rows["value"], yerr=error, **look)
    panel.axvline(8, color="0.6", lw=0.8, ls=":")
    panel.set_xscale("log", base=2)
    counts = sorted(frame["count"].unique())
    panel.set_xticks(counts, counts)
    panel.minorticks_off()
    panel.set(title="Other lengths", xlabel="frames read (8 in training)")
    panel.legend(loc="best", fontsize=6.5)


GENERAL_FIGURES = {"general_reach": general_reach}
