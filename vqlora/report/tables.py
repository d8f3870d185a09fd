r"""Tables of the paper, from results files to booktabs LaTeX and Markdown.

Each table is a pure function of a results folder: ``TABLES["main"](results) -> Table``. ``write_tables``
writes all of them as ``<out>/<name>.tex`` (a bare ``tabular`` for ``\input`` inside the float whose caption
the paper has) and ``<out>/<name>.md``. Same results, same bytes.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from vqlora.files import write_atomic
from vqlora.report.bit_tables import BIT_TABLES
from vqlora.report.cells import ARMS, CLAIMS, DOMAINS, METRICS, SHORT, Table, label, ordered, read_csv
from vqlora.report.checkpoint_tables import CHECKPOINT_TABLES
from vqlora.report.confirm_tables import CONFIRM_TABLES
from vqlora.report.cost_tables import COST_TABLES, DTYPES
from vqlora.report.frame_tables import FRAME_TABLES
from vqlora.report.gate_tables import GATE_TABLES
from vqlora.report.general_tables import GENERAL_TABLES
from vqlora.report.keys import (
    format_interval,
    format_number,
    latex_text,
)
from vqlora.report.method_tables import METHOD_TABLES, swept_table
from vqlora.report.placement_tables import PLACEMENT_TABLES
from vqlora.report.qualitative_tables import QUALITATIVE_TABLES
from vqlora.report.rank_tables import RANK_TABLES
from vqlora.report.scaling_tables import SCALING_TABLES
from vqlora.report.sound_tables import SOUND_TABLES

MAIN = ("nll", "slot_frac", "cider", "meteor", "t2v_r1", "qa_frac", "train_bytes", "trainable_frac")


def cell(frame: pd.DataFrame, metric: str) -> tuple[str, str]:
    """Value and interval of a metric in a long frame of one table row; a dash where it does not apply."""
    rows = frame[frame["metric"] == metric]
    if rows.empty or (isinstance(rows.iloc[0]["value"], float) and math.isnan(rows.iloc[0]["value"])):
        return "--", ""
    row = rows.iloc[0]
    return format_number(row["value"], metric), format_interval(row["low"], row["high"], metric)


def main_table(results: Path) -> Table:
    """Arms by domains: value above its 95% interval, for every metric of ``MAIN``."""
    frame = read_csv(results, "03_main/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    rows: list[tuple[str, ...] | None] = []
    for domain in ordered(frame["domain"], DOMAINS):
        rows += [None] * bool(rows) + [(rf"\emph{{{label(domain, DOMAINS)}}}",) + ("",) * len(MAIN)]
        of_domain = frame[frame["domain"] == domain]
        for arm in ordered(of_domain["arm"], ARMS):
            cells = [cell(of_domain[of_domain["arm"] == arm], metric) for metric in MAIN]
            rows.append((label(arm, ARMS), *(c[0] for c in cells)))
            if any(c[1] for c in cells):
                rows.append(("", *(rf"{{\scriptsize {c[1]}}}" if c[1] else "" for c in cells)))
    return Table(("Method", *(METRICS[metric] for metric in MAIN)), tuple(rows))


def sweep_table(results: Path) -> Table:
    """Validation NLL of every swept learning rate; the chosen one of each method is bold."""
    return swept_table(results, "03_main/sweep.csv", ARMS)


def tests_table(results: Path) -> Table:
    """The planned comparisons of the main experiment: difference, interval, margin, corrected p, verdict."""
    frame = read_csv(
        results,
        "03_main/tests.csv",
        ("domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p_holm", "verdict"),
    )
    rows: list[tuple[str, ...] | None] = []
    for domain in ordered(frame["domain"], DOMAINS):
        if rows:
            rows.append(None)
        for position, row in enumerate(frame[frame["domain"] == domain].to_dict("records")):
            metric = row["metric"]
            first, _, second = row["comparison"].partition("_vs_")
            claim = f"{label(first, SHORT)} {label(row['claim'], CLAIMS)} {label(second, SHORT)}"
            rows.append(
                (
                    label(domain, DOMAINS) if position == 0 else "",
                    claim,
                    METRICS.get(metric, metric),
                    format_number(row["value"], metric),
                    format_interval(row["low"], row["high"], metric),
                    "--" if math.isnan(row["margin"]) else format_number(row["margin"], metric),
                    format_number(row["p_holm"], "p_holm"),
                    latex_text(row["verdict"]),
                )
            )
    return Table(
        ("Domain", "Claim", "Metric", "Gain", "95\\% interval", "Margin", r"\emph{p} (Holm)", "Verdict"),
        tuple(rows),
        left=3,
    )


def settings_table(results: Path) -> Table:
    """Settings that all arms of the main experiment share."""
    frame = read_csv(results, "03_main/settings.csv", ("metric", "value"))
    return Table(
        ("Setting", "Value"),
        tuple(
            (label(row["metric"], {}), setting(row["value"], row["metric"]))
            for row in frame.to_dict("records")
        ),
    )


def setting(text: object, metric: str) -> str:
    """A setting as the profile has it: whole numbers by kind, other numbers in full, words as they are."""
    try:
        number = float(str(text))
    except ValueError:
        return latex_text(str(text))
    return format_number(number, metric) if number == round(number) else f"{number:g}"


def rates_table(results: Path) -> Table:
    """The learning rate of each arm on each domain, and where it comes from."""
    frame = read_csv(results, "03_main/lr.csv", ("domain", "arm", "bits", "learning_rate", "origin"))
    frame = frame[frame["arm"] != "frozen"]
    domains, rows = ordered(frame["domain"], DOMAINS), []
    for arm in ordered(frame["arm"], ARMS):
        own = frame[frame["arm"] == arm].set_index("domain")
        found = (format_number(own.loc[domain, "learning_rate"], "learning_rate") for domain in domains)
        rows.append((label(arm, ARMS), *found, latex_text(", ".join(dict.fromkeys(own["origin"])))))
    return Table(("Method", *(label(domain, DOMAINS) for domain in domains), "From"), tuple(rows))


def textonly_table(results: Path) -> Table:
    """Accuracy of the text-only guesser over all questions of each domain, next to chance."""
    frame = read_csv(
        results, "01_data/textonly.csv", ("domain", "kind", "questions", "chance_frac", "guess_frac")
    )
    frame = frame[frame["kind"] == "all"].set_index("domain")
    return Table(
        ("Domain", "Questions", "Chance", "Text only"),
        tuple(
            (
                label(domain, DOMAINS),
                *(
                    format_number(frame.loc[domain, column], column)
                    for column in ("questions", "chance_frac", "guess_frac")
                ),
            )
            for domain in ordered(frame.index, DOMAINS)
        ),
    )


def data_table(results: Path) -> Table:
    """What each domain holds."""
    heads = {
        "domain": "Domain",
        "train_clips": "Train",
        "val_clips": "Val",
        "devtest_clips": "Dev-test",
        "test_clips": "Test",
        "frames": "Frames",
        "duration_s": "Length",
        "events_mean": "Events",
        "captions_per_clip": "Captions",
        "questions_per_clip": "Questions",
    }
    return wide_table(results, "01_data/domains.csv", heads, {"domain": DOMAINS})


def base_table(results: Path) -> Table:
    """The base on unseen source clips, by how frames are chosen; below, the stock class trained alike."""
    names = {"uniform": "evenly spaced", "cover": "covering events", "blind": "another clip's"}
    heads = {
        "frames": "Frames",
        "slot_frac": "Slot",
        "exact_frac": "Exact",
        "order_frac": "Order",
        "t2v_r1": "R@1",
        "qa_frac": "QA",
    }
    own = wide_table(results, "02_base/validation.csv", heads, {"frames": names})
    stock = read_csv(results, "02_base/stock.csv", ("base", "frames", "metric", "value"))
    wide = stock[stock["base"] == "stock"].pivot(index="frames", columns="metric", values="value")
    short = {"uniform": "even", "cover": "covering", "blind": "another's"}
    rows = [(f"SmolVLM, {short[view]}", *(format_number(wide.loc[view, m], m) for m in list(heads)[1:]))
            for view in names]  # fmt: skip
    return Table(own.head, (*own.rows, None, *rows))


def wide_table(
    results: Path, file: str, heads: Mapping[str, str], names: Mapping[str, Mapping[str, str]], left: int = 1
) -> Table:
    """A results file with one column per metric, in the order and under the heads given, no others."""
    frame = read_csv(results, file, tuple(heads))
    rows = []
    for row in frame[list(heads)].to_dict("records"):
        rows.append(
            tuple(
                label(value, names[column]) if column in names else format_number(value, column)
                for column, value in row.items()
            )
        )
    return Table(tuple(heads.values()), tuple(rows), left=left)


def architectures_table(results: Path) -> Table:
    """Hugging Face classes by what was tried on each: "yes", or the reason why not."""
    heads = ("class", "forward", "backward", "NF4", "reload", "merge", "gates", "audit")
    frame = read_csv(results, "13_architectures/runs.csv", heads)
    frame["class"] = frame["class"].str.replace("For(Conditional|Vision).*$", "", regex=True)
    rows = [tuple(latex_text(row[head]) for head in heads) for row in frame.to_dict("records")]
    return Table(("Class", *(h if h == "NF4" else h.capitalize() for h in heads[1:])), tuple(rows))


def gate_size_table(results: Path) -> Table:
    """Share of the trainable parameters that are gates, by model and kind of gate."""
    columns = ("model", "gate", "rank", "adapter_parameters", "gate_frac")
    frame = read_csv(results, "13_architectures/gates.csv", columns)
    kinds, rows = list(dict.fromkeys(frame["gate"])), []
    for model in dict.fromkeys(frame["model"]):
        own = frame[frame["model"] == model].set_index("gate")
        shares = [format_number(own.loc[kind, "gate_frac"], "gate_frac") for kind in kinds]
        total = f"{own.loc[kinds[-1], 'adapter_parameters']:,}".replace(",", r"\,")
        rows.append((latex_text(model), total, *shares))
    return Table(("Model", "Trained", *(kind.capitalize() for kind in kinds)), tuple(rows))


def compute_table(results: Path) -> Table:
    """What the runs behind each notebook took, and how wide the numbers are that they multiplied."""
    rows = []
    for path in sorted(Path(results).glob("[0-9]*/*cost.csv")):
        frame = pd.read_csv(path)
        if "key" not in frame:  # no runs of the store
            continue
        runs = frame.drop_duplicates("key")
        spent = [runs[name].sum() if name in runs else math.nan for name in ("train_cpu_s", "eval_cpu_s")]
        cells = (format_number(len(runs), "runs"), *(format_number(seconds, "cpu_s") for seconds in spent))
        name = f"{path.parent.name} {path.stem.removesuffix('cost').strip('_')}".strip()
        resident = format_number(runs["resident_peak_bytes"].max(), "peak_bytes")
        rows.append((latex_text(name), *cells, resident, _products(path)))
    heads = ("Notebook", "Runs", "Training", "Evaluation", "Largest resident set", "Products")
    return Table(heads, tuple(rows))


def _products(cost: Path) -> str:
    """Width of what was multiplied, from the runs beside the costs."""
    runs = pd.read_csv(cost.with_name(cost.name.removesuffix("cost.csv") + "runs.csv"))
    if "compute_dtype" not in runs:
        return "--"
    return ", ".join(label(name, DTYPES) for name in sorted(runs["compute_dtype"].unique()))


TABLES: dict[str, Callable[[Path], Table]] = {
    "architectures": architectures_table,
    "base": base_table,
    "compute": compute_table,
    "data": data_table,
    **FRAME_TABLES,
    "gate_size": gate_size_table,
    **GATE_TABLES,
    **GENERAL_TABLES,
    **QUALITATIVE_TABLES,
    "main": main_table,
    **METHOD_TABLES,
    **PLACEMENT_TABLES,
    **RANK_TABLES,
    "rates": rates_table,
    **SCALING_TABLES,
    **SOUND_TABLES,
    "settings": settings_table,
    "sweep": sweep_table,
    "tests": tests_table,
    "textonly": textonly_table,
    **COST_TABLES,
    **BIT_TABLES,
    **CHECKPOINT_TABLES,
    **CONFIRM_TABLES,
}


def write_tables(results: Path, out: Path) -> list[Path]:
    """Write every table as LaTeX and Markdown; the list of files written, sorted by name."""
    written = []
    for name, build in sorted(TABLES.items()):
        table = build(Path(results))
        written.append(write_atomic(Path(out) / f"{name}.md", table.markdown()))
        written.append(write_atomic(Path(out) / f"{name}.tex", table.latex()))
    return written
