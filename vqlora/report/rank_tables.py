"""Tables of notebook 06: what each allocation of ranks reaches, what it can lose, what it chooses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vqlora.report.cells import CLAIMS, DOMAINS, Table, label, ordered, read_csv
from vqlora.report.keys import format_interval, format_number, latex_text

RANK_NAMES = {
    "uniform": "Uniform",
    "vision-heavy": "Vision-heavy",
    "text-heavy": "Text-heavy",
    "entropy": "Entropy of inputs",
    "motion": "Motion",
    "gradient": "Gradient",
    "fisher": "Fisher",
    "gradient+quantization": "Gradient and bits lost",
    "relative": "Relative gradient",
    "scheduled": "Scheduled",
    "adalora": "AdaLoRA",
    "eva": "EVA",
}


def ranks_table(results: Path) -> Table:
    """NLL of every allocation on every domain, its worst gap to the best one, vision's share of ranks, and
    the share of the CPU time that choosing them takes."""
    summary = read_csv(results, "06_ranks/summary.csv", ("domain", "arm", "metric", "value", "low", "high"))
    worst = read_csv(results, "06_ranks/regret.csv", ("arm", "worst")).set_index("arm")["worst"]
    layers = read_csv(results, "06_ranks/ranks.csv", ("domain", "arm", "modality", "rank"))
    chosen = read_csv(results, "06_ranks/calibration.csv", ("arm", "metric", "value"))
    spent = chosen[chosen["metric"] == "calibration_frac"].set_index("arm")["value"]
    nll = summary[summary["metric"] == "nll"].set_index(["arm", "domain"])
    totals = layers.groupby(["arm", "domain", "modality"])["rank"].sum().unstack(fill_value=0)
    vision = totals["vision"] / totals.sum(axis=1)
    domains, rows = ordered(summary["domain"], DOMAINS), []
    for arm in ordered(summary["arm"], RANK_NAMES):
        cells = [_loss(nll.loc[(arm, domain)]) for domain in domains]
        shares = [format_number(vision[arm, domain], "frac_frac") for domain in domains]
        gap, taken = format_number(worst[arm], "nll"), format_number(spent[arm], "calibration_frac")
        rows.append((label(arm, RANK_NAMES), *cells, gap, " / ".join(shares), taken))
    heads = (f"NLL, {label(domain, DOMAINS).lower()}" for domain in domains)
    return Table(("Allocation", *heads, "Worst gap", "Ranks in vision", "To choose"), tuple(rows))


def _loss(row: pd.Series) -> str:
    interval = format_interval(row["low"], row["high"], "nll")
    return rf"{format_number(row['value'], 'nll')} {{\scriptsize {interval}}}"


def rank_tests_table(results: Path) -> Table:
    """The planned comparisons; below, where a profile has them, further methods and other budgets."""
    numbers = ("value", "low", "high", "p_holm", "smallest_effect")
    first, *more = (f"06_ranks/{name}.csv" for name in ("tests", "further", "budget_tests"))
    rows = []
    for file in (first, *(file for file in more if Path(results, file).is_file())):
        frame = read_csv(results, file, ("domain", "comparison", "claim", *numbers, "verdict"))
        if "budget" not in frame:
            frame = frame.assign(budget=0)
        for (budget, domain), own in frame.groupby(["budget", "domain"], sort=False):
            told = f", {format_number(budget, 'trainable_parameters')}" if budget else ""
            rows += [None] * bool(rows)
            rows += [(label(domain, DOMAINS) + told if not i else "", *_test(row))
                     for i, row in enumerate(own.to_dict("records"))]
    heads = ("Gain", r"95\% interval", "Smallest", r"\emph{p} (Holm)", "Verdict")
    return Table(("Domain", "Claim", *heads), tuple(rows), left=2)


def _test(row: dict) -> tuple[str, ...]:
    a, b = (label(arm, RANK_NAMES) for arm in row["comparison"].split("_vs_"))
    b = b.lower() if b[1:].islower() else b                  # EVA and AdaLoRA keep their letters
    return (
        f"{a} {CLAIMS[row['claim']]} {b}",
        format_number(row["value"], "nll"),
        format_interval(row["low"], row["high"], "nll"),
        format_number(row["smallest_effect"], "nll"),
        format_number(row["p_holm"], "p_holm"),
        latex_text(row["verdict"]),
    )


def rank_budgets_table(results: Path) -> Table:
    """Methods that were run at every budget: the learning rate chosen there, NLL on each domain and the worst
    gap to the best of them."""
    columns = ("budget", "domain", "arm", "metric", "value", "low", "high")
    frame = read_csv(results, "06_ranks/budgets.csv", columns)
    nll = frame[frame["metric"] == "nll"].set_index(["budget", "arm", "domain"])
    gap = frame[frame["domain"] == "worst"].set_index(["budget", "arm"])["value"]
    rates = _rates(results)
    domains, rows = ordered(nll.reset_index()["domain"], DOMAINS), []
    for budget in sorted(frame["budget"].unique()):
        own = gap[budget]
        rows += [None] * bool(rows)
        for place, arm in enumerate(ordered(own.index.to_series(), RANK_NAMES)):
            cells = [_loss(nll.loc[(budget, arm, domain)]) for domain in domains]
            named = "" if place else format_number(budget, "trainable_parameters")
            rate = rates.get((budget, arm), rates[0, arm])
            rows.append((named, label(arm, RANK_NAMES), rate, *cells, format_number(own[arm], "nll")))
    heads = (f"NLL, {label(domain, DOMAINS).lower()}" for domain in domains)
    return Table(("Parameters", "Allocation", "Rate", *heads, "Worst gap"), tuple(rows), left=2)


def _rates(results: Path) -> pd.Series:
    """Learning rates in words by budget and method, one or one for each domain; the main budget's under 0."""
    main = read_csv(results, "06_ranks/lr.csv", ("domain", "arm", "learning_rate")).assign(budget=0)
    path = Path(results, "06_ranks/budget_rates.csv")
    other = pd.read_csv(path) if path.is_file() else pd.DataFrame()
    rates = pd.concat([main, other[other["chosen"]]]) if len(other) else main
    places = {name: place for place, name in enumerate(ordered(rates["domain"], DOMAINS))}
    rates = rates.sort_values("domain", key=lambda names: names.map(places))
    told = rates["learning_rate"].map(lambda rate: format_number(rate, "learning_rate"))
    return told.groupby([rates["budget"], rates["arm"]]).agg(lambda own: " / ".join(dict.fromkeys(own)))


RANK_TABLES = {"rank_budgets": rank_budgets_table, "rank_tests": rank_tests_table, "ranks": ranks_table}
