"""Many runs, a few at a time, each in a process of its own; finished ones are stored and never made twice.

    results = run_grid(profile.main.runs(), RunStore("build/cpu"), profile)

A run that fails, or whose process is killed, costs that run alone: it is reported, the others go on, a killed
one is tried once more, and GridError at the end names what is missing. Calling again makes only that.
"""
from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqlora import processes
from vqlora.config import RunSettings
from vqlora.console import duration
from vqlora.experiments import Profile
from vqlora.hub import is_hub
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
ARM_MODULES = {"vqlora": ("vqlora.adapter", "vqlora.optimizer"), "adalora": ("vqlora.rivals",),
               "eva": ("vqlora.rivals",), "houlsby": ("vqlora.arms.houlsby",),
               "prefix": ("vqlora.arms.prefix",), "posttrain": ("vqlora.arms.posttrain",)}
RANK_MODULES = ("vqlora.ranks.runs",)                        # of runs that name an allocator
JUDGE_MODULES = ("vqlora.selection.judge",)                  # where policies are judged
SOUND_MODULES = ("vqlora.sound.store",)                      # of runs that listen
DATA_MODULES = ("vqlora.data.sources", "vqlora.data.small")  # of runs on data that are not rendered
Execute = Callable[[RunSettings, Path, Path], Any]           # (settings, data_root, work) -> RunResult
REFRESH_S = 5.0


class GridError(RuntimeError):
    """Some runs of a grid could not be made; the message names each. All others are stored."""


@dataclass
class Task:
    """A run that is to be made, under its key."""

    key: str
    settings: RunSettings
    code: str
    expected_s: float
    tries: int = 0
    started: float = 0.0


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None


def run_grid(runs: Iterable[RunSettings], store: RunStore, profile: Profile | int = 1, *,
             data_root: Path | None = None, execute: Execute | None = None, code: str | None = None,
             compute_dtype: str | None = None) -> list[StoredRun]:
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
        failed = _Grid(store, data_root, execute, workers).make(list(tasks.values()), len(set(keys)))
        if failed:
            raise GridError(f"{len(failed)} of {len(set(keys))} runs failed, the others are stored: "
                            + "; ".join(failed))
    found = [store.get(key) for key in keys]
    return [StoredRun(run.key, settings, run.metrics, run.cost, run.provenance, run.examples_path)
            for run, settings in zip(found, asked, strict=True)]


def executed(store: RunStore, key: str, settings: RunSettings, code: str, data_root: Path,
             execute: Execute | None = None) -> tuple[RunResult | None, dict[str, Any]]:
    """(result, provenance) of one run made here; a killed one goes on from what it left in its work folder.

    Of several processes that make it together only the first has the result. Where settings say so the
    trained model is saved, with its card.
    """
    execute = execute or importlib.import_module(_module(settings)).execute
    began, to = time.perf_counter(), {"save_to": settings.save_to} if settings.save_to else {}
    with _reporting(settings):
        result = execute(settings, data_root, store.work(key), **to)
    made = provenance(store.root, code=code, processes=processes.count())
    if result is not None:
        cost = {**result.cost, "wall_s": time.perf_counter() - began}
        result = RunResult(result.metrics, cost, result.examples)
        if to:
            importlib.import_module("vqlora.card").keep_record(settings.save_to, key, settings, result, made)
    return result, made


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
        raise GridError(f"{task.settings.name} failed: {_one_line(fault)} (log: {log})") from fault


def expected_s(settings: RunSettings) -> float:
    """Rough wall seconds of a run on one thread, before any was measured: loading, steps, evaluation."""
    rows = settings.batch_size * settings.accumulation * settings.frames / 256
    training = 0.0 if settings.arm == "frozen" else settings.steps * rows * 1.0
    judged = len(settings.judge) * len(settings.judge_frames) * (settings.eval_clips + settings.judge_clips)
    return 6.0 + training + (judged / 100.0 if judged else settings.eval_clips / 256 * 10.0)


def _reporting(settings: RunSettings):
    """Around training: loggers beside TensorBoard, where some are asked for."""
    if not settings.report_to:
        return nullcontext()
    return importlib.import_module("vqlora.reporting").reporting(settings.report_to)


def _module(settings: RunSettings) -> str:
    """Name of the module whose `execute` makes a run: checkpoints of the hub have their own."""
    if is_hub(settings.base) and (settings.generalizes or settings.sound):
        raise ValueError("languages, also_*, sound: go with the embedded base alone; allowed: none of them")
    own = "vqlora.general.run" if settings.generalizes else "vqlora.train"
    return "vqlora.hub.run" if is_hub(settings.base) else own


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
    needed = [(execute.__module__ if execute else _module(run), *ARM_MODULES.get(run.arm, ()),
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


@dataclass
class _Grid:
    """One call of `run_grid`: hands tasks to worker processes and keeps the progress line."""

    store: RunStore
    data_root: Path
    execute: Execute | None
    workers: int
    failed: list[str] = field(default_factory=list)
    done: list[tuple[float, float]] = field(default_factory=list)    # (expected, measured) seconds

    def make(self, tasks: list[Task], total: int) -> list[str]:
        """Run all tasks; returns one `name (reason)` per run that could not be made."""
        queue = deque(sorted(tasks, key=lambda task: -task.expected_s))   # long ones first: a shorter tail
        pool: list[_Worker] = []
        bar = tqdm(total=total, initial=total - len(tasks), desc="runs", file=sys.stderr, dynamic_ncols=True,
                   mininterval=0, bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}")
        try:
            while queue or any(worker.task for worker in pool):
                self._hand_out(queue, pool)
                bar.set_postfix_str(self._estimate(queue, pool))
                ready = wait([worker.connection for worker in pool if worker.task], timeout=REFRESH_S)
                for worker in [worker for worker in pool if worker.connection in ready]:
                    self._collect(worker, queue, pool, bar)
        finally:
            for worker in pool:
                worker.connection.close()                    # an idle worker then ends by itself
            for worker in pool:
                worker.process.join(timeout=0 if worker.task else 2)
                worker.process.kill()
            bar.close()
        return self.failed

    def _hand_out(self, queue: deque[Task], pool: list[_Worker]) -> None:
        while queue and sum(worker.task is not None for worker in pool) < self.workers:
            idle = next((worker for worker in pool if worker.task is None), None)
            worker = idle or self._start(pool, queue[0].settings.threads)
            try:
                worker.connection.send((queue[0].key, queue[0].settings, queue[0].code))
            except OSError:                                  # it died while idle; nothing is lost
                pool.remove(worker)
                continue
            worker.task = queue.popleft()
            worker.task.tries += 1
            worker.task.started = time.monotonic()

    def _start(self, pool: list[_Worker], threads: int) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (theirs, self.store.root, self.data_root, self.execute, os.getpid())
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive",
                          TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore"):
            process.start()                                  # threads must be set before torch is imported
        theirs.close()
        pool.append(_Worker(process, ours))
        return pool[-1]

    def _collect(self, worker: _Worker, queue: deque[Task], pool: list[_Worker], bar: tqdm) -> None:
        task, worker.task = worker.task, None
        took = time.monotonic() - task.started
        try:
            fault = worker.connection.recv()
        except (EOFError, OSError):
            pool.remove(worker)
            worker.process.join(timeout=10)
            fault = f"its process {_ending(worker.process.exitcode)}"
            if task.tries == 1:
                bar.write(f"{task.settings.name}: {fault}; it is tried once more", file=sys.stderr)
                queue.append(task)
                return
        if fault:
            log = self.store.work(task.key) / "log.txt"
            bar.write(f"{task.settings.name} failed: {fault} (log: {log})", file=sys.stderr)
            self.failed.append(f"{task.settings.name} ({fault})")
        else:
            self.done.append((task.expected_s, took))
        bar.update()

    def _estimate(self, queue: deque[Task], pool: list[_Worker]) -> str:
        """Time left: expected seconds, corrected by the runs that are finished and those that are overdue."""
        now = time.monotonic()
        running = [worker.task for worker in pool if worker.task]
        typical = sum(task.expected_s for task in (*queue, *running)) / max(1, len(queue) + len(running))
        late = [(task.expected_s, 1.25 * (now - task.started)) for task in running
                if now - task.started > task.expected_s]
        guessed, took = (sum(times) for times in zip(*self.done, *late, (typical, typical), strict=True))
        factor = took / guessed
        left = [max(factor * task.expected_s - (now - task.started), 0.1 * factor * task.expected_s)
                for task in running]
        total = sum(left) + factor * sum(task.expected_s for task in queue)
        names = ", ".join(task.settings.name.split("/", 1)[1] for task in running)
        return f"about {duration(max([total / self.workers, *left]))} left; now {names}"


class _environment:
    """Set environment variables for the block (a spawned child inherits them)."""

    def __init__(self, **values: str):
        self.values = values

    def __enter__(self):
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_):
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _work(connection: Connection, root: Path, data_root: Path, execute: Execute | None,
          parent: int) -> None:
    """Life of a worker process: takes (key, settings, code), answers "" when stored, else the fault."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the parent decides what an interrupt means
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    store = RunStore(root)
    while True:
        try:
            key, settings, code = connection.recv()
        except (EOFError, OSError):
            return
        folder = store.work(key)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)                         # what it prints, C code too, goes to its log
            os.dup2(log.fileno(), 2)
        try:
            store.put(key, settings, *executed(store, key, settings, code, data_root, execute))
            answer = ""
        except BaseException as fault:
            traceback.print_exc()
            sys.stderr.flush()
            answer = _one_line(fault)
        connection.send(answer)


def _one_line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {(str(fault).strip().splitlines() or ['no message'])[0]}"


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: nobody is left to use or stop it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {exitcode}"
