"""Tables of notebook 12: what is wrong with captions, and where words look."""

from __future__ import annotations

from pathlib import Path

from vqlora.report.cells import ARMS, DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

FAULTS = {
    "right_frac": "All right",
    "object_frac": "Object",
    "motion_frac": "Motion",
    "order_frac": "Order",
    "missing_frac": "Missing",
    "extra_frac": "Extra",
    "style_frac": "Style",
}
WORDS = {"object": "Name of an object", "motion": "Verb", "aside": "Name in the spliced-in shot"}


def failures_table(results: Path) -> Table:
    """Share of captions with each kind of fault, by domain and arm; how many captions are wrong at all."""
    columns = ("domain", "arm", "metric", "value", "count")
    frame = read_csv(results, "12_qualitative/failures.csv", columns)
    cells = frame.set_index(["domain", "arm", "metric"])
    rows: list[tuple[str, ...] | None] = []
    for domain in ordered(frame["domain"], DOMAINS):
        rows += [None] * bool(rows)
        arms = ordered(frame.loc[frame["domain"] == domain, "arm"], ARMS)
        for arm in arms:
            found = cells.loc[(domain, arm)]
            shares = (format_number(found.loc[name, "value"], name, unit=False) for name in FAULTS)
            wrong = format_number(found.loc["wrong_frac", "count"], "captions")
            named = label(domain, DOMAINS) if arm == arms[0] else ""
            rows.append((named, label(arm, ARMS), *shares, wrong))
    return Table(("Domain", "Method", *FAULTS.values(), "Wrong"), tuple(rows), left=2)


def looks_table(results: Path) -> Table:
    """Share of a word's attention that its own event gets, and those of other clips; the claims."""
    looks = read_csv(results, "12_qualitative/looks.csv", ("model", "kind", "what", "metric", "value"))
    columns = ("what", "kind", "low", "high", "p_holm", "verdict")
    tests = read_csv(results, "12_qualitative/tests.csv", columns)
    cells = looks.set_index(["model", "what", "kind", "metric"])["value"]
    rows: list[tuple[str, ...] | None] = []
    for what in ("frames", "cell"):
        rows += [None] * bool(rows)
        own = tests[tests["what"] == what].set_index("kind")
        for kind in ordered(own.index, WORDS):
            test = own.loc[kind]
            shares = (format_number(cells["tuned", what, kind, f"{name}_frac"], "share_frac", unit=False)
                      for name in ("share", "even", "others"))  # fmt: skip
            rows.append((
                what.capitalize() if kind == ordered(own.index, WORDS)[0] else "", WORDS[kind], *shares,
                format_interval(test["low"], test["high"], "gain_frac"),
                format_number(cells["frozen", what, kind, "gain_frac"], "gain_frac", unit=False),
                format_number(test["p_holm"], "p_holm"), latex_text(test["verdict"]),
            ))  # fmt: skip
    heads = ("Own", "Even", "Others", "Own less others", "Same, frozen", r"\emph{p} (Holm)", "Verdict")
    return Table(("Where", "Word", *heads), tuple(rows), left=2)


QUALITATIVE_TABLES = {"failures": failures_table, "looks": looks_table}
