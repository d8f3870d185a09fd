"""Numbers of the reference that a reviewer can make again without training, and whether they come out so.

    for check in CHECKS: check.faults(Path("results"))

From rows per example (``results/runs``, a run store like any other) come means, intervals and tests; from
planned tests their correction and verdicts; from finer tables the coarser ones. What is left was measured or
trained.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora.store import RunStore, write_csv

NEAR = 1e-6  # files hold eight digits


@dataclass(frozen=True)
class Check:
    """One file that follows from others: how, and by what function of the results folder."""

    file: str
    source: str
    make: Callable[[Path], pd.DataFrame]
    needs: tuple[str, ...]
    slow: bool = False  # more than a few seconds

    def ready(self, results: Path) -> bool:
        """Whether the file and all it follows from are there."""
        return all(Path(results, name).exists() for name in (self.file, *self.needs))

    def faults(self, results: Path) -> list[str]:
        """[] or the cells that do not follow, five at most."""
        found = pd.read_csv(io.StringIO(_as_written(self.make(Path(results)))))
        kept = pd.read_csv(Path(results, self.file))
        columns = [column for column in found if column in kept]
        if len(found) != len(kept) or not columns:
            return [f"{self.file}: {len(kept)} rows; {len(found)} follow from {self.source}"]
        faults = []
        for column in columns:
            for line in np.flatnonzero(~_equal(found[column], kept[column])):
                faults.append(f"{self.file}, line {line + 2}, {column}: {kept[column][line]}; "
                              f"{self.source} give {found[column][line]}")  # fmt: skip
        return faults[:5]


def _as_written(frame: pd.DataFrame) -> str:
    """The frame through the writer of results files: same order of rows, same digits."""
    with tempfile.TemporaryDirectory() as folder:
        write_csv(Path(folder, "frame.csv"), frame)
        return Path(folder, "frame.csv").read_text(encoding="utf-8")


def _equal(a: pd.Series, b: pd.Series) -> np.ndarray:
    x, y = (pd.to_numeric(column, errors="coerce").to_numpy(float) for column in (a, b))
    near = np.isclose(x, y, rtol=NEAR, atol=1e-12)
    words = [column.astype(object).fillna("").astype(str).to_numpy() for column in (a, b)]
    return near | (words[0] == words[1])


def _kept_runs(results: Path, notebook: str, file: str = "cost.csv"):
    """The runs of a notebook in the order of its table, read from the kept store."""
    table, store = pd.read_csv(results / notebook / file), RunStore(results)
    runs = []
    for row in table.to_dict("records"):
        run = store.get(row["key"])
        if run is None or not run.examples_path.is_file():
            raise FileNotFoundError(f"{store.path(row['key'])}: not kept with its examples")
        # What a run is called is not part of its key: two notebooks may share it under names of their own.
        called = {"seed": int(row["seed"]), "experiment": row["experiment"], "label": row["arm"]}
        settings = run.settings.model_copy(update=called)
        runs.append(type(run)(run.key, settings, run.metrics, run.cost, run.provenance, run.examples_path))
    return runs


def _main_summary(results: Path) -> pd.DataFrame:
    from vqlora.comparison import summarise

    return summarise(_kept_runs(results, "03_main"))


def _main_tests(results: Path) -> pd.DataFrame:
    from vqlora.comparison import judge, planned_claims

    kept = pd.read_csv(results / "03_main" / "tests.csv")
    return judge(_kept_runs(results, "03_main"), planned_claims(float(kept["margin"].max())))


def _more_tests(results: Path) -> pd.DataFrame:
    from vqlora.experiments import load_profile
    from vqlora.studies.method_study import judge

    # The bootstrap draws claim after claim: in the order of the profile that they were made with.
    methods = load_profile("full", Path(__file__).resolve().parents[2]).methods
    return judge(methods, _kept_runs(results, "03_main", "more_cost.csv"))


def _rank_tests(results: Path) -> pd.DataFrame:
    from vqlora.comparison import judge
    from vqlora.studies.rank_study import rank_claims

    kept = pd.read_csv(results / "06_ranks" / "tests.csv")
    return judge(_kept_runs(results, "06_ranks"), rank_claims(float(kept["margin"].max())))


def _confirmed(results: Path) -> pd.DataFrame:
    from vqlora.experiments import load_profile
    from vqlora.studies.confirm_study import judge

    parts = load_profile("confirm", Path(__file__).resolve().parents[2]).confirm
    kept = {run.key: run for run in _kept_runs(results, "15_confirmation")}
    return judge(parts, [[kept[key] for key in _keys(part, kept)] for part in parts])


def _keys(part, runs) -> list[str]:
    """Keys of those runs that are of a part, in its order."""
    named = {(run.settings.domain, run.settings.method, run.settings.seed): key for key, run in runs.items()}
    return [named[run.domain, run.method, run.seed] for run in part.runs()]


def _over_budgets(results: Path) -> pd.DataFrame:
    from vqlora.studies.rank_study import over_budgets

    tests = results / "06_ranks" / "budget_tests.csv"
    found = pd.read_csv(results / "06_ranks" / "budgets.csv")
    return over_budgets(found, pd.read_csv(tests) if tests.is_file() else None)


def _arms_by_cost(results: Path) -> pd.DataFrame:
    from vqlora.studies.scaling_study import arms_by_cost

    return arms_by_cost(results)


def _fronts(results: Path) -> pd.DataFrame:
    from vqlora.studies.scaling_study import fronts

    return fronts(pd.read_csv(results / "10_scaling" / "pareto.csv"))


def _failures(results: Path) -> pd.DataFrame:
    from vqlora.qualitative.captions import failure_table, judged_captions

    return failure_table(judged_captions(_kept_runs(results, "03_main")))


def _corrected(file: str, within: str = "family") -> Callable[[Path], pd.DataFrame]:
    """Holm's correction and the verdicts of a file of planned tests, from its p-values and intervals; within
    each value of a column, where the file has it."""

    def make(results: Path) -> pd.DataFrame:
        from vqlora import stats

        table = pd.read_csv(results / file)
        return stats.corrected(table, within if within in table else None)

    return make


def _chosen_frames(results: Path) -> pd.DataFrame:
    from vqlora.selection.gains import CHOSEN, with_chosen

    folder = results / "07_frames"
    policies, validation = (pd.read_csv(folder / f"{name}.csv") for name in ("policies", "validation"))
    return with_chosen(policies[policies["policy"] != CHOSEN], validation)


def _gap(results: Path) -> pd.DataFrame:
    from vqlora.selection.gains import closed_gap

    return closed_gap(pd.read_csv(results / "07_frames" / "policies.csv"))


def _frames_summary(results: Path) -> pd.DataFrame:
    from vqlora.selection.gains import closed_gap, summary

    policies, kept = (pd.read_csv(results / "07_frames" / f"{name}.csv") for name in ("policies", "summary"))
    best = kept.loc[kept["metric"] == "name", "value"].iloc[0]
    return summary(policies, closed_gap(policies), best)


def _rates(results: Path) -> pd.DataFrame:
    sweep, named = pd.read_csv(results / "03_main" / "sweep.csv"), ["domain", "arm"]
    best = sweep.loc[sweep.groupby(named)["value"].idxmin()]
    kept = pd.read_csv(results / "lr.csv")
    return kept[[*named, "bits"]].merge(best, on=named)[[*named, "bits", "learning_rate", "value"]]


def _peaks(results: Path) -> pd.DataFrame:
    from vqlora.cost.study import judged_peaks

    return judged_peaks(pd.read_csv(results / "08_bits" / "planner.csv"))


CHECKS = (
    Check(
        "03_main/summary.csv",
        "the rows per example in runs/",
        _main_summary,
        ("runs", "03_main/cost.csv"),
        slow=True,
    ),  # fmt: skip
    Check("03_main/tests.csv", "the rows per example in runs/", _main_tests, ("runs", "03_main/cost.csv")),
    Check("03_main/tests.csv", "p-values and intervals", _corrected("03_main/tests.csv"), ()),
    Check("03_main/more_tests.csv", "the rows per example in runs/", _more_tests,
          ("runs", "03_main/more_cost.csv")),
    Check("03_main/more_tests.csv", "p-values and intervals", _corrected("03_main/more_tests.csv"), ()),
    Check("06_ranks/tests.csv", "the rows per example in runs/", _rank_tests, ("runs", "06_ranks/cost.csv")),
    Check("06_ranks/further.csv", "p-values and intervals", _corrected("06_ranks/further.csv"), ()),
    Check("06_ranks/budget_tests.csv", "p-values and intervals", _corrected("06_ranks/budget_tests.csv"), ()),
    Check("06_ranks/over_budgets.csv", "budgets.csv, budget_tests.csv", _over_budgets,
          ("06_ranks/budgets.csv",)),
    Check("09_rank_size_and_placement/tests.csv", "p-values and intervals",
          _corrected("09_rank_size_and_placement/tests.csv"), ()),
    Check("10_scaling/pareto.csv", "runs, costs and summaries of 03, 06, 08 and 09", _arms_by_cost,
          ("runs", "03_main/summary.csv", "09_rank_size_and_placement/summary.csv")),  # fmt: skip
    Check("10_scaling/fronts.csv", "pareto.csv", _fronts, ("10_scaling/pareto.csv",)),
    Check("08_bits/tests.csv", "p-values and intervals", _corrected("08_bits/tests.csv"), ()),
    Check("07_frames/policies.csv", "validation.csv", _chosen_frames, ("07_frames/validation.csv",)),
    Check("07_frames/gap.csv", "policies.csv", _gap, ("07_frames/policies.csv",)),
    Check("07_frames/summary.csv", "policies.csv", _frames_summary, ("07_frames/policies.csv",)),
    Check("11_generalization/tests.csv", "p-values and intervals",
          _corrected("11_generalization/tests.csv", "family"), ()),
    Check("16_sound/tests.csv", "p-values and intervals", _corrected("16_sound/tests.csv", "family"), ()),
    Check("12_qualitative/failures.csv", "the rows per example in runs/", _failures,
          ("runs", "03_main/cost.csv"), slow=True),
    Check("15_confirmation/tests.csv", "the rows per example in runs/", _confirmed,
          ("runs", "15_confirmation/cost.csv")),  # fmt: skip
    Check("lr.csv", "03_main/sweep.csv", _rates, ("03_main/sweep.csv",)),
    Check("08_bits/peaks.csv", "planner.csv", _peaks, ("08_bits/planner.csv",), slow=True),
)
