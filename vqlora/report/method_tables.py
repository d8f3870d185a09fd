"""Tables of notebook 03 beside its main comparison: more methods, each against QLoRA, and learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vqlora.report.cells import CLAIMS, DOMAINS, NOT_RUN, Table, label, ordered, rate_cell, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text
from vqlora.studies.method_study import NAMES


def methods_table(results: Path) -> Table:
    """NLL with its interval and slot accuracy on each domain, and what a method trains, holds and takes."""
    if not Path(results, "03_main/more.csv").is_file():
        return Table(("Method",), ((NOT_RUN,),))
    frame = read_csv(results, "03_main/more.csv", ("domain", "arm", "metric", "value", "low", "high"))
    times = read_csv(results, "03_main/more_times.csv", ("arm", "metric", "value"))
    seconds = times[times["metric"] == "train_cpu_s"].set_index("arm")["value"]
    cells, domains, rows = frame.set_index(["arm", "domain", "metric"]), ordered(frame["domain"], DOMAINS), []
    for arm in ordered(frame["arm"], NAMES):
        row = [_capital(label(arm, NAMES))]
        for domain in domains:
            nll = cells.loc[(arm, domain, "nll")]
            interval = format_interval(nll["low"], nll["high"], "nll")
            row.append(rf"{format_number(nll['value'], 'nll')} {{\scriptsize {interval}}}")
            row.append(format_number(cells.loc[(arm, domain, "slot_frac"), "value"], "slot_frac", unit=False))
        for metric in ("trainable_parameters", "step_peak_bytes", "train_bytes"):
            row.append(format_number(cells.loc[(arm, domains[0], metric), "value"], metric))
        rows.append((*row, format_number(seconds[arm], "train_cpu_s")))
    heads = [head for domain in domains for head in (f"NLL, {label(domain, DOMAINS).lower()}", "Slot")]
    return Table(("Method", *heads, "Trained", "Step peak", "Memory", "Training"), tuple(rows))


def method_tests_table(results: Path) -> Table:
    """The planned comparisons: methods against QLoRA, then what is left of full fine-tuning in low bits."""
    if not Path(results, "03_main/more_tests.csv").is_file():
        return Table(("Claim",), ((NOT_RUN,),))
    columns = ("value", "low", "high", "claim", "p_holm", "smallest_effect", "verdict", "family")
    frame, rows = read_csv(results, "03_main/more_tests.csv", ("domain", "comparison", *columns)), []
    for family in ordered(frame["family"], {"methods": ""}):
        for domain in ordered(frame["domain"], DOMAINS):
            own = frame[(frame["family"] == family) & (frame["domain"] == domain)].to_dict("records")
            rows += [None] * bool(rows)
            rows += [(label(domain, DOMAINS) if row is own[0] else "", *_test(row)) for row in own]
    heads = ("Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Domain", "Claim", *heads), tuple(rows), left=2)


def _test(row: Mapping) -> tuple[str, ...]:
    a, b = (label(arm, NAMES) for arm in row["comparison"].split("_vs_"))
    return (
        _capital(f"{a} {CLAIMS[row['claim']]} {b}"),
        format_number(row["value"], "nll"),
        format_interval(row["low"], row["high"], "nll"),
        format_number(row["smallest_effect"], "nll"),
        format_number(row["p_holm"], "p_holm"),
        latex_text(row["verdict"]),
    )


def method_rates_table(results: Path) -> Table:
    """Validation NLL of every rate that was swept for these methods."""
    if not Path(results, "03_main/more_sweep.csv").is_file():
        return Table(("Method",), ((NOT_RUN,),))
    names = {arm: _capital(name) for arm, name in NAMES.items()}
    return swept_table(results, "03_main/more_sweep.csv", names)


def swept_table(results: Path, file: str, names: Mapping[str, str]) -> Table:
    """Validation NLL of every learning rate in a sweep's file; the chosen one of each method is bold."""
    frame = read_csv(results, file, ("domain", "arm", "learning_rate", "metric", "value", "chosen"))
    frame = frame[frame["metric"] == "nll"]
    rates = sorted(frame["learning_rate"].unique())
    rows = []
    for domain in ordered(frame["domain"], DOMAINS):
        if rows:
            rows.append(None)
        of_domain = frame[frame["domain"] == domain]
        for position, arm in enumerate(ordered(of_domain["arm"], names)):
            own = of_domain[of_domain["arm"] == arm]
            cells = (rate_cell(own[own["learning_rate"] == rate]) for rate in rates)
            rows.append((label(domain, DOMAINS) if position == 0 else "", label(arm, names), *cells))
    heads = (format_number(rate, "learning_rate") for rate in rates)
    return Table(("Domain", "Method", *heads), tuple(rows), left=2)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


METHOD_TABLES = {
    "method_rates": method_rates_table, "method_tests": method_tests_table, "methods": methods_table
}  # fmt: skip
