"""Finished runs on disk, each under the hash of all it depends on, and the results tables made from them.

    build/<profile>/runs/<key>.json               settings, metrics, cost, provenance
    build/<profile>/runs/examples/<key>.parquet   one row per example
    build/<profile>/work/<key>/                   log and checkpoints while the run is under way
    build/<profile>/tensorboard/<name>/           its TensorBoard log, kept

A file appears whole or not at all. `runs/<key>.json` is written last: where it is, the run is finished.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlora.config import RunSettings
from vqlora.identity import digest
from vqlora.result import RunResult

if TYPE_CHECKING:
    import pandas

NAMED = ("experiment", "domain", "arm", "bits", "seed")
SHOWN = ("rank", "learning_rate", "steps", "batch_size", "frames", "select", "train_clips", "eval_part",
         "eval_clips", "compute_dtype")
UNUSED = ("experiment", "label", "base", "save_to", "report_to")
UNUSED_BY_FROZEN = frozenset((
    "seed", "rank", "alpha", "dropout", "rslora", "modalities", "layers", "learning_rate", "steps",
    "batch_size", "accumulation", "warmup_steps", "schedule", "weight_decay", "contrastive_weight",
    "question_share", "train_clips", "train_frames", "gradient_checkpointing", "optimizer", "languages"))
OF_GATES = frozenset(("gate", "gate_modalities", "control", "gate_rate", "gate_features"))
OF_RANKS = frozenset(("ranks", "rank_ratio", "budget"))
OF_GENERAL = frozenset(("languages", "also_domains", "also_frames", "also_languages"))


class StoreError(OSError):
    """A result could not be written; the message is one line that names the file."""


@dataclass(frozen=True)
class StoredRun:
    """A finished run read back from the store."""

    key: str
    settings: RunSettings
    metrics: dict[str, float]
    cost: dict[str, float]
    provenance: dict[str, Any]
    examples_path: Path

    def examples(self) -> pandas.DataFrame:
        """One row per clip and task item."""
        import pandas
        return pandas.read_parquet(self.examples_path)


def run_key(settings: RunSettings, data_hash: str, base_hash: str, code_hash: str,
            processes: int = 1) -> str:
    """Identity of a run. Its labels, the path of its base (whose bytes count) and where it is saved or
    logged do not count.

    Threads and processes do: sums come out in another order, and so do the last bits of what is trained.

    Settings that an arm never reads are left out: the seeds of a frozen model are one run.
    """
    values = settings.model_dump(mode="json", exclude=set(UNUSED))
    unused = UNUSED_BY_FROZEN if settings.arm == "frozen" else frozenset()
    unused |= OF_GATES if settings.arm != "vqlora" else frozenset()
    later = (*OF_RANKS, "data", "prompt", "sound", "gate_modalities")
    unused |= {name for name in later if values[name] is None}
    unused |= {name for name in OF_GENERAL if not values[name]}
    if values["data"]:
        del values["data"]["root"]                           # the data's bytes count, not their place
    values = {key: value for key, value in values.items() if key not in unused}
    return digest(values, data_hash, base_hash, code_hash, *([processes] if processes > 1 else []))


class RunStore:
    """Finished runs below `root` (`build/<profile>`)."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def path(self, key: str) -> Path:
        return self.root / "runs" / f"{key}.json"

    def examples_path(self, key: str) -> Path:
        return self.root / "runs" / "examples" / f"{key}.parquet"

    def work(self, key: str) -> Path:
        """The run's work folder, made if missing; what a killed run left there is kept, to go on from."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, settings: RunSettings, result: RunResult,
            provenance: Mapping[str, Any] | None = None) -> None:
        """Store a result and remove the run's work folder but for its TensorBoard log. Raises StoreError."""
        if result.examples is not None:
            with whole_file(self.examples_path(key)) as path:
                result.examples.to_parquet(path, index=False)
        record = {"key": key, "settings": settings.model_dump(mode="json"), "cost": _numbers(result.cost),
                  "metrics": _numbers(result.metrics), "provenance": dict(provenance or {})}
        with whole_file(self.path(key)) as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        work, kept = self.root / "work" / key, self.root / "tensorboard" / settings.name.replace("/", "-")
        if (work / "tensorboard").is_dir():
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            (work / "tensorboard").replace(kept)
        shutil.rmtree(work, ignore_errors=True)

    def get(self, key: str) -> StoredRun | None:
        """The finished run, or None; a file that cannot be read counts as missing and is named on stderr."""
        path = self.path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return StoredRun(key, RunSettings.model_validate_json(json.dumps(record["settings"])),
                             {k: math.nan if v is None else v for k, v in record["metrics"].items()},
                             {k: math.nan if v is None else v for k, v in record["cost"].items()},
                             record["provenance"], self.examples_path(key))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            print(f"{path}: not a finished run ({type(fault).__name__}); it is made again", file=sys.stderr)
            return None

    def all(self) -> list[StoredRun]:
        """Every finished run, sorted by key."""
        found = (self.get(path.stem) for path in sorted((self.root / "runs").glob("*.json")))
        return [run for run in found if run is not None]


@contextmanager
def whole_file(path: Path):
    """Yields a temporary path beside `path`; renamed to it when the block ends well. Raises StoreError."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o644)
        temporary = Path(name)
        yield temporary
        temporary.replace(path)
    except OSError as fault:
        text = f"{path}: cannot be written ({os.strerror(fault.errno) if fault.errno else fault})"
        raise StoreError(text) from fault
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def results_frame(results: Iterable[StoredRun]) -> pandas.DataFrame:
    """One row per run: what names it, the settings that matter, its metrics. Sorted, fit for `runs.csv`."""
    return _frame(results, lambda run, varying: {**_setting_columns(run, varying), **run.metrics})


def cost_frame(results: Iterable[StoredRun]) -> pandas.DataFrame:
    """One row per run: what names it, its key in the store, its cost on this machine."""
    return _frame(results, lambda run, _: {"key": run.key, **run.cost})


def write_results(out_dir: str | Path, runs: pandas.DataFrame, cost: pandas.DataFrame | None = None,
                  manifest: Mapping[str, Any] | None = None) -> None:
    """Write `runs.csv` (same bytes for same numbers), `cost.csv`, `manifest.json` (bound to the machine)."""
    write_csv(Path(out_dir, "runs.csv"), runs)
    if cost is not None:
        write_csv(Path(out_dir, "cost.csv"), cost)
    if manifest is not None:
        with whole_file(Path(out_dir, "manifest.json")) as path:
            path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_csv(path: str | Path, frame: pandas.DataFrame) -> None:
    """Write a table, rows sorted by its columns of text and whole numbers, floats to 8 digits."""
    leading = [name for name in frame.columns if frame[name].dtype.kind not in "fc"]
    if leading and len(frame):
        frame = frame.sort_values(leading, kind="stable", key=lambda column: column.astype(str)
                                  if column.dtype.kind not in "iub" else column)
    with whole_file(Path(path)) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.8g", lineterminator="\n")


def _frame(results, columns) -> pandas.DataFrame:
    import pandas
    results = list(results)
    dumps = [run.settings.model_dump(mode="json") for run in results]
    apart = (*NAMED, *SHOWN, "base", "label", "data")
    varying = [name for name in RunSettings.model_fields if name not in apart
               and len({json.dumps(dump[name]) for dump in dumps}) > 1]
    rows = [{**{name: dump[name] for name in NAMED}, "arm": run.settings.method, **columns(run, varying)}
            for run, dump in zip(results, dumps, strict=True)]
    frame = pandas.DataFrame(rows)
    return frame.sort_values(list(NAMED), kind="stable", ignore_index=True) if rows else frame


def _setting_columns(run: StoredRun, varying: list[str]) -> dict[str, Any]:
    dump = run.settings.model_dump(mode="json")
    return {name: "+".join(map(str, value)) if isinstance(value := dump[name], list) else value
            for name in (*SHOWN, *varying)}


def _numbers(values: Mapping[str, Any]) -> dict[str, float | int | str | None]:
    """Plain JSON values: numpy scalars unpacked, NaN as null."""
    plain = {}
    for key, value in values.items():
        value = value.item() if hasattr(value, "item") else value
        plain[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    return plain
