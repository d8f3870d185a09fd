"""Many runs, a few at a time, each in a process of its own; finished ones are stored and never made twice.

    results = run_grid(profile.main.runs(), RunStore("build/cpu"), profile)

A run that fails, or whose process is killed, costs that run alone: it is reported, the others go on, a killed
one is tried once more, and GridError at the end names what is missing. Calling again makes only that.
"""
from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from vqlora import processes
from vqlora.config import RunSettings
from vqlora.experiments import Profile
from vqlora.grid.local import Pool
from vqlora.grid.task import Execute, Task, executed, module_of, one_line
from vqlora.identity import base_hash, code_hash, data_hash, digest, provenance
from vqlora.store import (
    RunResult,
    RunStore,
    StoredRun,
    StoreError,
    cost_frame,
    results_frame,
    run_key,
    write_csv,
    write_results,
)

__all__ = ["GridError", "RunResult", "RunStore", "StoreError", "StoredRun", "base_hash", "code_hash",
           "cost_frame", "data_hash", "expected_s", "provenance", "results_frame", "run_grid", "run_key",
           "write_csv", "write_results"]

# What `baselines` and `train` take by name, so that a change of it reruns only the arms that use it.
ARM_MODULES = {"vqlora": ("vqlora.arms.gated", "vqlora.optimizer"), "adalora": ("vqlora.rivals",),
               "eva": ("vqlora.rivals",), "houlsby": ("vqlora.arms.houlsby",),
               "prefix": ("vqlora.arms.prefix",), "posttrain": ("vqlora.arms.posttrain",)}
RANK_MODULES = ("vqlora.ranks.runs",)                        # of runs that name an allocator
JUDGE_MODULES = ("vqlora.selection.judge",)                  # where policies are judged
SOUND_MODULES = ("vqlora.sound.store",)                      # of runs that listen
DATA_MODULES = ("vqlora.data.sources", "vqlora.data.small")  # of runs on data that are not rendered


class GridError(RuntimeError):
    """Some runs of a grid could not be made; the message names each. All others are stored."""


def run_grid(runs: Iterable[RunSettings], store: RunStore, profile: Profile | int = 1, *,
             data_root: Path | None = None, execute: Execute | None = None, code: str | None = None,
             compute_dtype: str | None = None, cluster: str | None = None) -> list[StoredRun]:
    """Make the runs that `store` lacks, `profile.workers` at a time; returns all, in the order asked for.

    Called in each of several processes that a launcher started, it makes one run after the other, each by all
    of them together (`vqlora.processes`); the first fault then ends the call.

    Args:
        runs: settings; equal runs are made once.
        profile: a profile, or the number of workers; 0 makes the runs in this process, one after the other.
        data_root: folder with one folder per domain; `<store.root>/data` unless given.
        execute: what makes one run, importable by name; `vqlora.train.execute` unless given.
        code: hash of the code that the runs depend on; that of all `execute` reaches unless given.
        compute_dtype: what "auto" stands for, `fp32` or `bf16`; probed unless given.
        cluster: address of a Ray cluster that makes them in place of this machine; the profile's unless
            given. See `vqlora.grid.cluster`.

    Raises:
        GridError: after all else is finished and stored, if any run failed.
    """
    workers = profile if isinstance(profile, int) else profile.workers
    data_root = Path(data_root or store.root / "data")
    asked = _resolved(list(runs), compute_dtype)
    codes = _codes(asked, execute) if code is None else [code] * len(asked)
    keys = _keys(asked, data_root, codes)
    pairs = list(zip(keys, asked, strict=True))
    missing = processes.told(lambda: {key for key, settings in pairs if _lacks(store, key, settings)})
    tasks: dict[str, Task] = {}
    for key, settings, its_code in zip(keys, asked, codes, strict=True):
        if key in missing:
            tasks.setdefault(key, Task(key, settings, its_code, 0.0))
    if tasks and (workers == 0 or processes.count() > 1):
        for task in tasks.values():
            _make_here(task, store, data_root, execute)
    elif tasks:
        _predict(tasks.values(), store)
        address = cluster or getattr(profile, "cluster", None)
        if address:
            from vqlora.grid.cluster import Cluster

            made_by = Cluster(store, data_root, execute, address)
        else:
            made_by = Pool(store, data_root, execute, workers)
        failed = made_by.make(list(tasks.values()), len(set(keys)))
        if failed:
            raise GridError(f"{len(failed)} of {len(set(keys))} runs failed, the others are stored: "
                            + "; ".join(failed))
    found = [store.get(key) for key in keys]
    return [StoredRun(run.key, settings, run.metrics, run.cost, run.provenance, run.examples_path)
            for run, settings in zip(found, asked, strict=True)]


def _make_here(task: Task, store: RunStore, data_root: Path, execute: Execute | None) -> None:
    try:
        result, made = executed(store, task.key, task.settings, task.code, data_root, execute)
        if result is not None:
            store.put(task.key, task.settings, result, made)
        processes.wait()
    except Exception as fault:
        log = store.work(task.key) / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        raise GridError(f"{task.settings.name} failed: {one_line(fault)} (log: {log})") from fault


def expected_s(settings: RunSettings) -> float:
    """Rough wall seconds of a run on one thread, before any was measured: loading, steps, evaluation."""
    rows = settings.batch_size * settings.accumulation * settings.frames / 256
    training = 0.0 if settings.arm == "frozen" else settings.steps * rows * 1.0
    judged = len(settings.judge) * len(settings.judge_frames) * (settings.eval_clips + settings.judge_clips)
    return 6.0 + training + (judged / 100.0 if judged else settings.eval_clips / 256 * 10.0)


def _lacks(store: RunStore, key: str, settings: RunSettings) -> bool:
    """Whether a run is to be made: its result, or the model that it shall leave, is not there."""
    if store.get(key) is None or not settings.save_to:
        return store.get(key) is None
    return not importlib.import_module("vqlora.card").has_record(settings.save_to, key)


def _resolved(runs: list[RunSettings], dtype: str | None) -> list[RunSettings]:
    """The dtype that "auto" stands for here is part of a run's identity, so it is filled in."""
    if dtype is None and any(settings.compute_dtype == "auto" for settings in runs):
        import torch

        from vqlora.precision import compute_dtype as probe
        dtype = probe("auto", "cuda" if torch.cuda.is_available() else "cpu").name
    return [run.model_copy(update={"compute_dtype": dtype}) if run.compute_dtype == "auto" else run
            for run in runs]


def _codes(runs: Sequence[RunSettings], execute: Execute | None) -> list[str]:
    """The hash of the code that each run depends on: only gated arms depend on the adapter's."""
    needed = [(execute.__module__ if execute else module_of(run), *ARM_MODULES.get(run.arm, ()),
               *(RANK_MODULES if run.ranks is not None else ()), *(SOUND_MODULES if run.sound else ()),
               *(JUDGE_MODULES if run.judge else ()), *(DATA_MODULES if run.data else ()))
              for run in runs]
    hashes = {modules: code_hash(modules) for modules in set(needed)}
    return [hashes[modules] for modules in needed]


def _keys(runs: Sequence[RunSettings], data_root: Path, codes: Sequence[str]) -> list[str]:
    data = {where: _data_hash(data_root, *where) for where in {_where(settings) for settings in runs}}
    bases = {base: base_hash(base) for base in {settings.base for settings in runs}}
    return [run_key(settings, data[_where(settings)], bases[settings.base], code, processes.count())
            for settings, code in zip(runs, codes, strict=True)]


def _where(settings: RunSettings) -> tuple:
    """(domain, None, *further ones) of rendered data; (domain, folder) of other data."""
    return settings.domain, settings.data.root if settings.data else None, *settings.also_domains


def _data_hash(data_root: Path, domain: str, root: str | None, *also: str) -> str:
    if also:
        return digest(*(data_hash(data_root, name) for name in (domain, *also)))
    if root is None:
        return data_hash(data_root, domain)
    return importlib.import_module("vqlora.data.sources").source_hash(root)


def _predict(tasks: Iterable[Task], store: RunStore) -> None:
    """Set each task's expected seconds, from finished runs of the same kind where the store has some."""
    seen: dict[tuple, list[float]] = {}
    for run in store.all():
        if "wall_s" in run.cost:
            seen.setdefault(_likeness(run.settings), []).append(run.cost["wall_s"])
    for task in tasks:
        times = sorted(seen.get(_likeness(task.settings), ()))
        task.expected_s = times[len(times) // 2] if times else expected_s(task.settings)


def _likeness(settings: RunSettings) -> tuple:
    names = ("arm", "bits", "steps", "batch_size", "frames", "eval_clips", "judge", "judge_frames",
             "also_domains", "also_frames", "also_languages")
    return tuple(getattr(settings, name) for name in names)
