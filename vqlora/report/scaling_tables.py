"""Tables of notebook 10: laws of the curves, and which arm to pick for a given memory."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.report.cells import ARMS, DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import ResultsError, format_interval, format_number, latex_text
from vqlora.report.placement_tables import PLACEMENT_NAMES
from vqlora.report.rank_tables import RANK_NAMES
from vqlora.studies.method_study import NAMES

FOLDER = "10_scaling"
AXES = {
    "rank": "Ranks of each layer",
    "clips": "Training clips",
    "frames": "Frames shown",
    "bits": "Bits of a weight",
    "base": "Parameters of the base",
}
CURVES = {**DOMAINS, "targets": "Target domains"}
MIXED = {f"mixed-{n}": f"NF4, {n}\\% of the way to 16 bits" for n in (10, 25, 50)}
METHODS = {arm: name[0].upper() + name[1:] for arm, name in NAMES.items()}
ARM_NAMES = {**METHODS, **ARMS, "bf16": ARMS["lora"], **RANK_NAMES, **MIXED, **PLACEMENT_NAMES}
RECIPES = {"main": "recipe of 03", "ranks": "recipe of 06", "placement": "recipe of 09"}


def size_name(x: float) -> str:
    """A size as ticks and tables name it.

    >>> [size_name(x) for x in (2.5, 64, 1200, 456_712, 8_100_056)]
    ['2.5', '64', '1,200', '0.46M', '8.1M']
    """
    if x >= 1e5:
        return f"{x / 1e6:.2g}M"
    return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def scaling_table(results: Path) -> Table:
    """Every fitted curve: sizes, exponent, whether sizes determine it, and how the largest is foretold."""
    frame, points = fitted(results), read_csv(results, f"{FOLDER}/points.csv", ("axis", "domain", "x"))
    ends, rows = points.groupby(["axis", "domain"])["x"].agg(["min", "max", "size"]), []
    for axis in ordered(frame["axis"], AXES):
        of_axis = frame[frame["axis"] == axis]
        for domain in ordered(of_axis["domain"], CURVES):
            own = of_axis[of_axis["domain"] == domain].set_index("metric")
            low, high, count = ends.loc[(axis, domain)]
            exponent, gain = own.loc["exponent"], own.loc["gain_nll"]
            errors = (own.loc[name, "value"] for name in ("misfit_nll", "held_nll", "naive_nll"))
            rows.append((
                label(axis, AXES), label(domain, CURVES),
                f"{count:g} from {size_name(low)} to {size_name(high)}".replace(",", r"\,"),
                _between(exponent, "exponent"), own.loc["state", "value"],
                *(format_number(float(error), "held_nll") for error in errors),
                _between(gain, "gain_nll"), latex_text(gain["verdict"]),
            ))  # fmt: skip
    heads = ("Axis", "Curve", "Sizes", "Exponent", "It is", "Misfit", "Error, law", "last", "Gain", "Verdict")
    return Table(heads, tuple(rows) or (("--",) * len(heads),), left=5)


def bases_table(results: Path) -> Table:
    """Bases of several sizes, tuned: rate and NLL by domain, gain over the next smaller one.

    One row of dashes where a profile trains none.
    """
    heads = ("Domain", "Base", "Parameters", "Rate", "NLL", "Gain over smaller", "Smallest",
             r"\emph{p} (Holm)", "Verdict")  # fmt: skip
    if not Path(results, FOLDER, "bases.csv").is_file():
        return Table(heads, (("--",) * len(heads),), left=2)
    columns = ("domain", "arm", "bits", "learning_rate")
    rates = read_csv(results, f"{FOLDER}/base_rates.csv", columns).set_index(["domain", "arm"])
    cost = read_csv(results, f"{FOLDER}/cost.csv", ("domain", "arm", "base_parameters"))
    points = read_csv(results, f"{FOLDER}/points.csv", ("axis", "domain", "x", "value", "low", "high"))
    nll = points[points["axis"] == "base"].set_index(["domain", "x"])
    size = cost[cost["arm"].isin(rates.index.unique("arm"))].groupby("arm")["base_parameters"].first()
    columns = ("domain", "comparison", "value", "low", "high", "p_holm", "smallest_effect", "verdict")
    tests = read_csv(results, f"{FOLDER}/bases.csv", columns)
    gains, rows = {(row["domain"], row["comparison"].split("_vs_")[0]): row
                   for row in tests.to_dict("records")}, []  # fmt: skip
    for domain in ordered(rates.index.get_level_values("domain").to_series(), DOMAINS):
        rows += [None] * bool(rows)
        for place, (arm, count) in enumerate(size.sort_values().items()):
            found = nll.loc[(domain, count)]
            told = _gain(gains[domain, arm]) if (domain, arm) in gains else ("--",) * 4
            rows.append((
                "" if place else label(domain, DOMAINS), str(arm), format_number(count, "parameters"),
                format_number(rates.loc[(domain, arm), "learning_rate"], "learning_rate"),
                rf"{format_number(found['value'], 'nll')} {{\scriptsize {_interval(found)}}}", *told,
            ))  # fmt: skip
    return Table(heads, tuple(rows), left=2)


def _gain(row: dict) -> tuple[str, ...]:
    gain = rf"{format_number(row['value'], 'nll')} {{\scriptsize {_interval(row)}}}"
    smallest, p = format_number(row["smallest_effect"], "nll"), format_number(row["p_holm"], "p_holm")
    return (gain, smallest, p, latex_text(row["verdict"]))


def _interval(row) -> str:
    return format_interval(row["low"], row["high"], "nll")


def _between(row: pd.Series, metric: str) -> str:
    interval = format_interval(row["low"], row["high"], metric)
    return f"{format_number(float(row['value']), metric)} {interval}".strip()


def fitted(results: Path) -> pd.DataFrame:
    """The laws; without a row where no curve of the profile has sizes enough."""
    path = Path(results, FOLDER, "fits.csv")
    if not path.is_file():
        raise ResultsError(f"{path}: missing; `make {FOLDER[:2]}` writes it")
    return pd.read_csv(path)


def pick_table(results: Path) -> Table:
    """Of every recipe and domain the arms on the front of loss against memory, from the least memory up."""
    columns = ("recipe", "domain", "arm", "nll", "low", "high", "train_bytes", "step_flops",
               "trainable_parameters", "front_train_bytes", "seeds")  # fmt: skip
    frame, rows = distinct(read_csv(results, f"{FOLDER}/pareto.csv", columns)), []
    for domain in ordered(frame["domain"], DOMAINS):
        for recipe in ordered(frame["recipe"], RECIPES):
            own = frame[(frame["domain"] == domain) & (frame["recipe"] == recipe)]
            least = own[own["front_train_bytes"]].sort_values("train_bytes").to_dict("records")
            rows += [None] * bool(rows and least)
            rows += [(f"{label(domain, DOMAINS)}, {RECIPES[recipe]}" if row is least[0] else "", *_pick(row))
                     for row in least]  # fmt: skip
    heads = ("Domain", "From memory", "Take", "NLL", "FLOPs of a step", "Trainable")
    return Table(heads, tuple(rows), left=3)


def _pick(row: dict) -> tuple[str, ...]:
    interval = format_interval(row["low"], row["high"], "nll")
    few = " (one seed)" if row["seeds"] == 1 else ""
    return (
        format_number(row["train_bytes"], "train_bytes"),
        label(row["arm"], ARM_NAMES) + few,
        rf"{format_number(row['nll'], 'nll')} {{\scriptsize {interval}}}",
        format_number(row["step_flops"], "step_flops"),
        format_number(row["trainable_parameters"], "trainable_parameters"),
    )


def distinct(arms: pd.DataFrame) -> pd.DataFrame:
    """Without the recipes whose arms are all there under another name already."""
    seen, kept = [], []
    for recipe in ordered(arms["recipe"], RECIPES):
        cells = arms.loc[arms["recipe"] == recipe, ["domain", "arm", "nll"]]
        own = set(cells.itertuples(index=False, name=None))
        if not any(own <= other for other in seen):
            kept.append(recipe)
        seen.append(own)
    return arms[arms["recipe"].isin(kept)]


SCALING_TABLES = {"bases": bases_table, "pick": pick_table, "scaling": scaling_table}
