"""Table of notebook 14: the main comparison on a checkpoint of real size."""

from __future__ import annotations

from pathlib import Path

from vqlora.report.cells import ARMS, DOMAINS, METRICS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number

FILE = "14_checkpoints/summary.csv"
SHOWN = ("nll", "token_accuracy_frac", "cider", "qa_frac", "weight_bytes", "train_bytes", "trainable_frac")


def checkpoints_table(results: Path) -> Table:
    """Means of every method on every domain, each above its 95% interval where it has one."""
    if not Path(results, FILE).is_file():
        return Table(("Method",), (("not run with this profile",),))
    frame = read_csv(results, FILE, ("domain", "arm", "metric", "value", "low", "high"))
    found, rows = frame.set_index(["domain", "arm", "metric"]).sort_index(), []
    for domain in ordered(frame["domain"], DOMAINS):
        rows += [None] * bool(rows)
        arms = ordered(frame.loc[frame["domain"] == domain, "arm"], ARMS)
        for arm in arms:
            own = found.loc[(domain, arm)].reindex(SHOWN)
            values = [format_number(row["value"], metric) for metric, row in own.iterrows()]
            intervals = [format_interval(row["low"], row["high"], metric) for metric, row in own.iterrows()]
            rows.append((label(domain, DOMAINS) if arm == arms[0] else "", label(arm, ARMS), *values))
            rows.append(("", "", *(rf"{{\scriptsize {text}}}" if text else "" for text in intervals)))
    heads = {**METRICS, "weight_bytes": "Weights"}
    return Table(("Domain", "Method", *(heads[metric] for metric in SHOWN)), tuple(rows), left=2)


CHECKPOINT_TABLES = {"checkpoints": checkpoints_table}
