"""Figure of notebook 16: which questions are answered by ear."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vqlora.report.cells import DOMAINS, label, ordered, read_csv
from vqlora.report.sound_tables import ARMS, FOLDER

KINDS = {"direction": "Which way", "count": "How many", "when": "When", "what": "Who does it",
         "order": "Who first", "where": "Where", "still": "Who is there"}  # fmt: skip
MARKS = {"silent": ("#999999", "s"), "shuffled": ("#D55E00", "v"), "fixed": ("#E69F00", "^"),
         "sound": ("#0072B2", "o"), "gated": ("#009E73", "D"), "silent-8": ("#000000", "P")}  # fmt: skip
OTHER = ("#CC79A7", "x")


def sound_kinds(results: Path) -> Figure:
    """Right answers by kind of question with 95% intervals, a panel a domain: points of all arms."""
    frame = read_csv(results, f"{FOLDER}/kinds.csv", ("domain", "arm", "metric", "value", "low", "high"))
    frame = frame.assign(kind=frame["metric"].str.removeprefix("qa_").str.removesuffix("_frac"))
    frame = frame[frame["kind"].isin(KINDS)]
    domains, arms = ordered(frame["domain"], DOMAINS), ordered(frame["arm"], ARMS)
    figure, panels = plt.subplots(1, len(domains), squeeze=False, figsize=(6.5, 2.8), sharey=True)
    for panel, domain in zip(panels[0], domains, strict=True):
        shown = ordered(frame.loc[frame["domain"] == domain, "kind"], KINDS)
        for number, arm in enumerate(arms):
            own = frame[(frame["domain"] == domain) & (frame["arm"] == arm)].set_index("kind").loc[shown]
            colour, marker = MARKS.get(arm, OTHER)
            places = [place + 0.12 * (number - (len(arms) - 1) / 2) for place in range(len(shown))]
            ends = [own["value"] - own["low"], own["high"] - own["value"]]
            panel.errorbar(places, own["value"], yerr=ends, fmt=marker, color=colour, markersize=3.5,
                           label=label(arm, ARMS))  # fmt: skip
        panel.set_xticks(range(len(shown)), [KINDS[kind] for kind in shown])
        panel.set(title=label(domain, DOMAINS), ylim=(0, 1.03))
        panel.grid(False, axis="x")
    panels[0][0].set_ylabel("Right answers")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
