"""Figure of notebook 06: which layers each allocation gives its ranks to."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from vqlora.report.cells import DOMAINS, ordered, read_csv
from vqlora.report.rank_tables import RANK_NAMES


def rank_layers(results: Path) -> Figure:
    """Mean rank of every layer by every allocation."""
    layers = read_csv(results, "06_ranks/ranks.csv", ("domain", "arm", "place", "modality", "rank"))
    places = {arm: place for place, arm in enumerate(ordered(layers["arm"], RANK_NAMES))}
    layers = layers.sort_values("arm", key=lambda arms: arms.map(places), kind="stable")
    return ranks_by_layer(layers.replace({"arm": RANK_NAMES}))


def ranks_by_layer(layers: pd.DataFrame) -> Figure:
    """Mean rank of each layer, one line a method and one panel a domain; parts of the model side by side.

    Args:
        layers: domain, arm, place (of the layer in the model), modality, rank; a row per seed.
    """
    domains = ordered(layers["domain"], DOMAINS)
    methods = list(dict.fromkeys(layers["arm"]))
    figure, panels = plt.subplots(
        len(domains), 1, squeeze=False, sharex=True, layout="constrained",
        figsize=(6.8, len(domains) * (0.45 + 0.14 * len(methods))),
    )  # fmt: skip
    first = layers.drop_duplicates("place").sort_values("place")
    starts = first.drop_duplicates("modality")
    for panel, domain in zip(panels[:, 0], domains, strict=True):
        own = layers[layers["domain"] == domain]
        wide = own.groupby(["arm", "place"])["rank"].mean().unstack(fill_value=0).loc[methods]
        sns.heatmap(wide, ax=panel, cmap="viridis", vmin=0, rasterized=True, cbar_kws={"label": "rank"})
        panel.set(title=DOMAINS.get(domain, domain), xlabel="", ylabel="")
        names = ["\n" * (n % 2) + name for n, name in enumerate(starts["modality"])]  # fusion is narrow
        panel.set_xticks(starts["place"], names, ha="left", rotation=0)
        for place in starts["place"][1:]:
            panel.axvline(place, color="white", lw=1)
    return figure


RANK_FIGURES = {"rank_layers": rank_layers}
