"""Learning rates of the arms of a notebook: one for each arm on each domain.

    rates = settle(main, sweep, own, committed)      # domain, arm, bits, learning_rate, origin
    runs = run_grid(rated(main.runs(), rates), here.store, here.profile)
    table = sweep_table(sweep, rates, committed)     # domain, arm, every rate tried with its loss, chosen

One rate for all domains would be decided by the one with the largest losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from vqlora.config import RunSettings
from vqlora.experiments import MainSettings
from vqlora.store import StoredRun, write_csv

RATED = ["domain", "arm", "bits"]
RATES = [*RATED, "learning_rate", "origin"]
TRIED = ["domain", "arm", "learning_rate", "metric", "value"]


def choose(sweep: Sequence[StoredRun], metric: str = "nll") -> pd.DataFrame:
    """The rate of each arm with the lowest mean loss over the seeds of a sweep: RATED,
    learning_rate, value."""
    columns = [*RATED, "learning_rate"]
    rows = [(*(getattr(run.settings, name) for name in ("domain", "method", "bits", "learning_rate")),
             run.metrics[metric]) for run in sweep]  # fmt: skip
    means = pd.DataFrame(rows, columns=[*columns, "value"]).groupby(columns, as_index=False)["value"].mean()
    return means.loc[means.groupby(RATED)["value"].idxmin()].reset_index(drop=True)


def settle(
    compared: MainSettings, sweep: Sequence[StoredRun], own: Path, committed: Path
) -> pd.DataFrame:
    """The learning rate of every arm on every domain: from this profile's sweep, else the committed one, else
    the profile: RATES.

    One that was not swept takes that of a domain that was. What a sweep found is written to ``own``, where
    later notebooks of the profile find it.
    """
    own.unlink(missing_ok=True)
    if sweep:
        write_csv(own, choose(sweep))
    path = next((path for path in (own, committed) if path.is_file()), None)
    known = _known(path) if path else pd.DataFrame(columns=[*RATED, "learning_rate"])
    word, rows = "sweep" if path == own else "committed sweep", []
    for domain in compared.domains:
        for arm in compared.arms:
            label = arm.label or arm.arm
            swept = known[(known["arm"] == label) & (known["bits"] == arm.bits)].set_index("domain")
            at = domain if domain in swept.index else next(iter(swept.index), None)
            rate = arm.learning_rate if at is None else float(swept.loc[at, "learning_rate"])
            origin = "profile" if at is None else word if at == domain else f"{word} on {at}"
            rows.append((domain, label, arm.bits, rate, origin))
    return pd.DataFrame(rows, columns=RATES)


def _known(path: Path) -> pd.DataFrame:
    table, wanted = pd.read_csv(path), [*RATED, "learning_rate"]
    if lacking := [name for name in wanted if name not in table]:
        raise ValueError(f"{path}: no column {lacking[0]!r}; needed: {', '.join(wanted)}")
    return table


def taken_from(rates: pd.DataFrame, like: dict[str, str]) -> pd.DataFrame:
    """Rates in which arms that are in no sweep have those of another one, by label: RATES."""
    known, made = rates.set_index(["domain", "arm"]), rates.copy()
    for row in rates[rates["arm"].isin(like)].itertuples():
        found = known.loc[(row.domain, like[row.arm])]
        made.loc[row.Index, ["learning_rate", "origin"]] = [
            found["learning_rate"], f"{found['origin']} of {like[row.arm]}"]  # fmt: skip
    return made


def rated(
    runs: Iterable[RunSettings], rates: pd.DataFrame, arm: str | None = None
) -> tuple[RunSettings, ...]:
    """The runs with the rates of their domains and arms, or of one `arm` for all."""
    known = rates.set_index(RATED)["learning_rate"]
    return tuple(
        run.model_copy(update={"learning_rate": float(known[run.domain, arm or run.method, run.bits])})
        for run in runs
    )


def sweep_table(sweep: Sequence[StoredRun], rates: pd.DataFrame, committed: Path) -> pd.DataFrame:
    """Every swept rate with its validation NLL: TRIED, chosen (it is the one used).

    Without a sweep in this profile, the committed table; without that, an empty one.
    """
    if sweep:
        settings = [run.settings for run in sweep]
        rows = [(s.domain, s.method, s.learning_rate, "nll", run.metrics["nll"])
                for s, run in zip(settings, sweep, strict=True)]  # fmt: skip
        table = pd.DataFrame(rows, columns=TRIED).groupby(TRIED[:4], as_index=False)["value"].mean()
    else:
        table = pd.read_csv(committed)[TRIED] if committed.is_file() else pd.DataFrame(columns=TRIED)
    used = {(row.domain, row.arm, f"{row.learning_rate:g}") for row in rates.itertuples()}
    tried = zip(table["domain"], table["arm"], table["learning_rate"], strict=True)
    return table.assign(chosen=[(domain, arm, f"{rate:g}") in used for domain, arm, rate in tried])
