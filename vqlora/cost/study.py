"""The planner's tables in notebook 08: every setting in a process of its own, and what its rows come to.

    table = check_apart(range(12), here.build / "planner")    # number, model, settings, part, predicted, ..
    judged_peaks(table)                     # a row a setting, with a verdict on each peak
    memory_parts(table), flops(table)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from vqlora.cost.check import SETTINGS, check_planner, peaks
from vqlora.cost.plan import INFERENCE, TRAINING
from vqlora.cost.sizes import known_sizes, stated_sizes
from vqlora.identity import base_hash, code_hash, digest
from vqlora.store import whole_file

TOLERANCE = 0.1
SHOWN = {0: "NF4", 1: "16 bits", 10: "full", 12: "NF4", 13: "16 bits", 19: "full"}  # whose parts are told


def check_apart(
    numbers: Iterable[int],
    kept: str | Path,
    *,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> pd.DataFrame:
    """`check_planner` of these of `SETTINGS`, each in a fresh process of one thread, `workers` at a time.

    Resident sets of models measured in one process would hold what the ones before left behind.
    kept: folder of what was measured; a setting is measured again only when the code or the base changed.
    """
    numbers = tuple(numbers)
    with ThreadPoolExecutor(workers) as threads:
        frames = list(threads.map(lambda number: _kept(number, Path(kept)), numbers))
    for number, frame in zip(numbers, frames, strict=True):
        ratios = frame.set_index("part").ratio
        say(f"{number}: predicted / measured: training {ratios['training peak']:.3f}, generation "
            f"{ratios['generation peak']:.3f}")  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def kept_file(number: int, kept: Path) -> Path:
    """Where what was measured of a setting is kept: its name is a hash over code and base."""
    made_by = digest(number, code_hash(["vqlora.cost.check"]), base_hash("released"))
    return kept / f"{number:02d}-{made_by}.csv"


def _kept(number: int, kept: Path) -> pd.DataFrame:
    path = kept_file(number, kept)
    if not path.is_file():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(_check, number).result()
        with whole_file(path) as part:
            found.to_csv(part, index=False)
    return pd.read_csv(path)


def _check(number: int) -> pd.DataFrame:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return check_planner([SETTINGS[number]]).assign(number=number)


def judged_peaks(table: pd.DataFrame) -> pd.DataFrame:
    """`check.peaks` with training_within and generation_within: "yes" for at most a tenth off."""
    wide = peaks(table)
    for title in ("training", "generation"):
        near = (wide[f"{title}_ratio"] - 1).abs() <= TOLERANCE
        wide[f"{title}_within"] = near.map({True: "yes", False: "no"})
    return wide


def size_tables(
    names: Sequence[str] | None, committed: str | Path, workers: int = 1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`known_sizes` and `stated_sizes` of these models; () is all of them, some ten minutes on two cores.

    None takes both from the folder `committed`, if they are there: they depend on no data and no machine.
    """
    files = [Path(committed, name) for name in ("sizes.csv", "stated.csv")]
    if names is None and all(file.is_file() for file in files):
        known, stated = map(pd.read_csv, files)
        return known, stated
    return known_sizes(names or (), workers=workers), stated_sizes(names or (), workers=workers)


def planner_summary(judged: pd.DataFrame) -> pd.DataFrame:
    """Keyed numbers by model and over all: settings_count, within_count (both peaks), and the largest
    deviation of training and generation as a fraction."""
    rows = []
    for model in ("all", *dict.fromkeys(judged["model"])):
        own = judged if model == "all" else judged[judged["model"] == model]
        both = (own["training_within"] == "yes") & (own["generation_within"] == "yes")
        rows += [(model, "settings_count", len(own)), (model, "within_count", int(both.sum()))]
        rows += [(model, f"{title}_worst_frac", (own[f"{title}_ratio"] - 1).abs().max())
                 for title in ("training", "generation")]  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "metric", "value"]).assign(domain="planner")


def claims_summary(stated: pd.DataFrame) -> pd.DataFrame:
    """Keyed results of `sizes.stated_sizes`: each row's verdict, what 16 bits take, how many got which verdict."""
    rows = []
    for row in stated.to_dict("records"):
        told = f"{row['least_gb']:.1f} GB or more at 16 bits"
        rows += [(row["size"].lower(), "verdict", row["verdict"]), (row["size"].lower(), "found_name", told)]
    counted = stated["verdict"].value_counts()
    words = ("supported", "denied", "undecided")
    rows += [("all", f"{word}_count", int(counted.get(word, 0))) for word in words]
    return pd.DataFrame(rows, columns=["arm", "metric", "value"]).assign(domain="stated")


def memory_parts(table: pd.DataFrame) -> pd.DataFrame:
    """Peaks by part where training is NF4, 16 bits or full: model, held, phase, part, predicted_bytes,
    measured_bytes. "unexplained" is scratch inside operations, "resident" the process's own growth."""
    parts = []
    for number in (n for n in SHOWN if n in set(table["number"])):
        own = table[table["number"] == number].set_index("part")
        names = [("training", part) for part in (*TRAINING, "unexplained", "peak")]
        names += [("generation", part) for part in (*INFERENCE, "unexplained", "peak")]
        rows = [(phase, part, *own.loc[f"{phase} {part}", ["predicted_bytes", "measured_bytes"]])
                for phase, part in names]  # fmt: skip
        rows.append(("training", "resident", None, own.loc["resident peak", "measured_bytes"]))
        frame = pd.DataFrame(rows, columns=["phase", "part", "predicted_bytes", "measured_bytes"])
        parts.append(frame.assign(number=number, model=own["model"].iloc[0], held=SHOWN[number]))
    columns = ["number", "model", "held", "phase", "part", "predicted_bytes", "measured_bytes"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def flops(table: pd.DataFrame) -> pd.DataFrame:
    """Operations of a training step and of the last generated token, all rows together, of the settings in
    `memory_parts`: model, held, of, predicted_flops, measured_flops."""
    own = table[table["number"].isin(SHOWN) & table["part"].isin(["step FLOPs", "token FLOPs"])]
    return pd.DataFrame({
        "number": own["number"], "model": own["model"], "held": own["number"].map(SHOWN),
        "of": own["part"].str.removesuffix(" FLOPs"), "predicted_flops": own["predicted_bytes"],
        "measured_flops": own["measured_bytes"],
    }).reset_index(drop=True)  # fmt: skip
