"""What is wrong with a caption, by kind, and which captions to show.

    faults(told, truth)        # {"missing": 1, "motion": 1, ...} of two lists of (object, motion)
    failure_table(runs)        # domain, arm, metric (missing_frac, ..), value, low, high
    chosen_captions(runs)      # domain, quantile, clip, arm, caption, faults: at quantiles of the NLL
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
import pandas as pd

from vqlora import stats
from vqlora.data.kinemoji.domains import DOMAINS
from vqlora.data.kinemoji.language import ASIDE_MOTION, STYLES, parse, verb
from vqlora.data.kinemoji.lexicon import ASIDE, Pattern
from vqlora.store import StoredRun

Pair = tuple[str, str]
FACTS = ("missing", "extra", "object", "motion", "order")
KINDS = {
    "right": "all events right",
    "wrong": "some event wrong",
    "missing": "an event is missing",
    "extra": "an event too many",
    "object": "wrong object",
    "motion": "wrong motion",
    "order": "right events, wrong order",
    "style": "no sentence of this style",
}
_SKIP = 1.25  # what leaving an event out costs in an alignment; two wrong slots cost 2


def faults(told: Sequence[Pair], truth: Sequence[Pair]) -> dict[str, int]:
    """How often each kind of FACTS occurs in the cheapest alignment of two lists of (object, motion).

    Events are aligned in their order, a wrong slot at cost 1 and a left-out or added event at 1.25, so that
    two events are taken for one with a wrong slot or two before they are taken for one missing and one too
    many. The same events in another order are one fault of "order" and no other.

    >>> faults([("cat", "left")], [("cat", "right"), ("dog", "spin")])
    {'missing': 1, 'motion': 1}
    """
    told, truth = list(told), list(truth)
    if told != truth and sorted(told) == sorted(truth):
        return {"order": 1}
    rows = [[(_SKIP * n, ("missing",) * n) for n in range(len(truth) + 1)]]
    for m, said in enumerate(told, start=1):
        row = [(_SKIP * m, ("extra",) * m)]
        for n, true in enumerate(truth, start=1):
            wrong = tuple(kind for kind, a, b in zip(("object", "motion"), said, true, strict=True) if a != b)
            row.append(min((
                (rows[-1][n - 1][0] + len(wrong), rows[-1][n - 1][1] + wrong),
                (row[-1][0] + _SKIP, (*row[-1][1], "missing")),
                (rows[-1][n][0] + _SKIP, (*rows[-1][n][1], "extra")),
            ), key=lambda step: step[0]))  # fmt: skip
        rows.append(row)
    counts = Counter(rows[-1][-1][1])
    return {kind: counts[kind] for kind in FACTS if counts[kind]}


def in_style(caption: str, domain: str) -> bool:
    """Whether a caption is a sentence of its domain's grammar: a way to tell what it tells, word for word."""
    words = " ".join(caption.split())
    return words in _tellings(tuple(parse(words)), DOMAINS[domain].style, DOMAINS[domain].lexicon)


@cache
def _tellings(told: tuple[Pair, ...], style: str, lexicon: str) -> frozenset[str]:
    """Every sentence of a style that tells the pairs in this order, in whichever synonyms."""
    events = [pair for pair in told if pair[1] != ASIDE_MOTION]
    asides = [name for name, motion in told if motion == ASIDE_MOTION]
    if not events or len(asides) > 1:
        return frozenset()
    made = set()
    for pattern in STYLES[style]["en"]:
        for synonyms in product(*[(0, 1)] * len(events)):
            pairs = zip(events, synonyms, strict=True)
            verbs = [verb(motion, "en", lexicon, which) for (_, motion), which in pairs]
            body = _body(pattern, events, verbs)
            tails = [pattern.aside.format(a=a, n=name) for name in asides for a in ASIDE["en"]] or [""]
            made |= {" ".join(part for part in (body, tail) if part) for tail in tails}
    return frozenset(made)


def _body(pattern: Pattern, events: Sequence[Pair], verbs: Sequence[str]) -> str:
    clauses = [pattern.clause.format(n=name, v=words, i=place)
               for place, ((name, _), words) in enumerate(zip(events, verbs, strict=True), 1)]  # fmt: skip
    linked = [part for clause in clauses[1:] for part in (pattern.link, clause)]
    return " ".join(part for part in (pattern.head, clauses[0], *linked) if part)


def judged_captions(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Each stored caption with its faults: domain, arm, seed, clip, nll, reference, caption, and a column of
    0 and 1 for each of KINDS. What is true is what the first reference tells.
    """
    rows = []
    for run in runs:
        examples = run.examples()
        for line in examples[examples["task"] == "caption"].to_dict("records"):
            found = faults(parse(line["prediction"]), parse(line["reference"]))
            marks = {kind: int(kind in found) for kind in FACTS}
            marks |= {"right": int(not found), "wrong": int(bool(found))}
            marks |= {"style": int(not in_style(line["prediction"], run.settings.domain))}
            rows.append({
                "domain": run.settings.domain, "arm": run.settings.method, "seed": run.settings.seed,
                "clip": line["clip"], "nll": line["nll"], "reference": line["reference"],
                "caption": line["prediction"], **{kind: marks[kind] for kind in KINDS},
            })  # fmt: skip
    return pd.DataFrame(rows)


def failure_table(captions: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Share of captions with each kind of fault (a caption may have several), and how many these are in all:
    domain, arm, metric (`<kind>_frac`), value, low, high, count.
    """
    rng, tables = np.random.default_rng(seed), []
    for kind in KINDS:
        values = captions.assign(value=captions[kind].astype(float))
        table = stats.summarise(values, rng, by=("domain", "arm")).rename(columns={"mean": "value"})
        table[["low", "high"]] = table[["low", "high"]].clip(0, 1)
        counts = values.groupby(["domain", "arm"])["value"].sum().astype(int)
        table["count"] = [counts[key] for key in zip(table["domain"], table["arm"], strict=True)]
        tables.append(table.assign(metric=f"{kind}_frac"))
    found = pd.concat(tables, ignore_index=True)
    return found[["domain", "arm", "metric", "value", "low", "high", "count"]]


def chosen_captions(
    captions: pd.DataFrame, by: str, quantiles: Sequence[float] = (0.1, 0.5, 0.9)
) -> pd.DataFrame:
    """The captions of all arms for the clips at quantiles of the NLL of arm `by` (first seed), by domain:
    picture (of the clip: a row of a sheet), domain, quantile, clip, arm, nll, reference, caption, faults
    (words, "none" where all is right).
    """
    first, rows, picture = captions[captions["seed"] == captions["seed"].min()], [], -1
    for domain, own in first.groupby("domain", sort=False):
        ranked = own[own["arm"] == by].sort_values(["nll", "clip"])
        for quantile in quantiles:
            clip = ranked["clip"].iloc[int(quantile * (len(ranked) - 1))]
            picture += 1
            for row in own[own["clip"] == clip].to_dict("records"):
                wrong = [kind for kind in (*FACTS, "style") if row[kind]]
                rows.append((picture, domain, quantile, clip, row["arm"], row["nll"], row["reference"],
                             row["caption"], ", ".join(wrong) or "none"))  # fmt: skip
    columns = ["picture", "domain", "quantile", "clip", "arm", "nll", "reference", "caption", "faults"]
    return pd.DataFrame(rows, columns=columns)
