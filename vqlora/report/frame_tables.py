"""Tables of notebook 07: what choices of frames are worth, which validation prefers, and damaged files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from vqlora.report.cells import DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_number
from vqlora.selection.gains import choices

POLICIES = {
    "uniform": "Even",
    "packets": "Packets",
    "cumulative-coverage": "Motion",
    "segments": "Segments",
    "own-segments": "Own",
    "chosen": "Chosen",
    "oracle": "Oracle",
}
SHOWN = ("uniform", "segments", "own-segments", "chosen", "oracle")  # a figure has more
NAMED = {"uniform": "even", "cumulative-coverage": "motion"}  # others go by their own names


def frames_table(results: Path) -> Table:
    """NLL on test clips by domain, for 4 and 8 frames chosen by the policies `SHOWN`."""
    return _policies(results, "nll", (4, 8))


def frames_seen_table(results: Path) -> Table:
    """Share of events that a chosen frame shows, by domain, for 4 and 8 frames."""
    return _policies(results, "seen_frac", (4, 8))


def frames_chosen_table(results: Path) -> Table:
    """The policy that validation clips choose, by domain and number of frames."""
    table = choices(read_csv(results, "07_frames/validation.csv", ("domain", "frames", "policy", "nll")))
    cells = table.set_index(["domain", "frames"])["policy"]
    counts = sorted(set(table["frames"]))
    rows = []
    for domain in ordered(dict.fromkeys(table["domain"]), DOMAINS):
        names = (cells.get((domain, count), "--") for count in counts)
        rows.append((label(domain, DOMAINS), *(NAMED.get(name, name) for name in names)))
    return Table(("Domain", *(str(count) for count in counts)), tuple(rows), left=1 + len(counts))


def _policies(results: Path, metric: str, counts: Sequence[int]) -> Table:
    frame = read_csv(results, "07_frames/summary.csv", ("domain", "policy", "frames", "metric", "value"))
    frame = frame[(frame["metric"] == metric) & frame["policy"].isin(SHOWN)]
    cells = frame.set_index(["domain", "frames", "policy"])["value"].astype(float)
    counts = [count for count in counts if count in set(frame["frames"])]
    heads = [f"{POLICIES[policy]}, {count}" for count in counts for policy in SHOWN]
    rows = []
    for domain in ordered(dict.fromkeys(frame["domain"]), DOMAINS):
        numbers = (cells.get((domain, count, policy), math.nan) for count in counts for policy in SHOWN)
        found = ("--" if math.isnan(n) else format_number(n, metric, unit=False) for n in numbers)
        rows.append((label(domain, DOMAINS), *found))
    return Table(("Domain", *heads), tuple(rows))


def per_policy_table(results: Path) -> Table:
    """Models trained and tested on the frames of one policy alone."""
    columns = ("domain", "frames", "policy", "seeds", "nll", "slot", "gain", "gain_se")
    frame = read_csv(results, "07_frames/per_policy.csv", columns)
    rows = [
        (label(row["domain"], DOMAINS), str(row["frames"]), label(row["policy"], POLICIES),
         format_number(row["nll"], "nll"), format_number(row["slot"], "slot_frac"),
         format_number(row["gain"], "gain"), format_number(row["gain_se"], "gain"))
        for row in frame.to_dict("records")
    ]  # fmt: skip
    return Table(("Domain", "Frames", "Policy", "NLL", "Slot", "Gain", "s.e."), tuple(rows))


def fuzz_table(results: Path) -> Table:
    """What readings of damaged files came to, by what was known of the file."""
    names = {"sha256": "Hash on record", "nothing": "Nothing known", "decord": "decord alone"}
    columns = ("error", "harmless", "silent", "hang", "crash")
    frame = read_csv(results, "07_frames/fuzz.csv", ("known", *columns))
    sums = frame.groupby("known")[list(columns)].sum()
    rows = [
        (name, *(format_number(n, "files") for n in (sums.loc[known].sum(), *sums.loc[known])))
        for known, name in names.items()
        if known in sums.index
    ]
    return Table(("Reading", "Files", "Error", "Harmless", "Silently wrong", "Hang", "Crash"), tuple(rows))


FRAME_TABLES: dict[str, Callable[[Path], Table]] = {
    "frames": frames_table,
    "frames_seen": frames_seen_table,
    "frames_chosen": frames_chosen_table,
    "frames_trained": per_policy_table,
    "fuzz": fuzz_table,
}
