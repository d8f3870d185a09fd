"""Runs in processes of this machine, a few at a time; one that is killed is tried once more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vqlora.grid.progress import Progress
from vqlora.grid.task import ENVIRONMENT, Execute, Task, executed, one_line
from vqlora.store import RunStore

REFRESH_S = 5.0


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None


@dataclass
class Pool:
    """Hands tasks to worker processes, each of which makes one run after the other."""

    store: RunStore
    data_root: Path
    execute: Execute | None
    workers: int
    failed: list[str] = field(default_factory=list)

    def make(self, tasks: list[Task], total: int) -> list[str]:
        """Make and store all runs; returns one `name (reason)` per run that could not be made.

        total: runs of the grid, those included that were there before.
        """
        queue = deque(sorted(tasks, key=lambda task: -task.expected_s))   # long ones first: a shorter tail
        pool: list[_Worker] = []
        with Progress(total, total - len(tasks), self.workers) as progress:
            try:
                while queue or any(worker.task for worker in pool):
                    self._hand_out(queue, pool)
                    progress.show(queue, [worker.task for worker in pool if worker.task])
                    ready = wait([worker.connection for worker in pool if worker.task], timeout=REFRESH_S)
                    for worker in [worker for worker in pool if worker.connection in ready]:
                        self._collect(worker, queue, pool, progress)
            finally:
                for worker in pool:
                    worker.connection.close()                # an idle worker then ends by itself
                for worker in pool:
                    worker.process.join(timeout=0 if worker.task else 2)
                    worker.process.kill()
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
        with _environment(OMP_NUM_THREADS=str(threads), **ENVIRONMENT):
            process.start()
        theirs.close()
        pool.append(_Worker(process, ours))
        return pool[-1]

    def _collect(self, worker: _Worker, queue: deque[Task], pool: list[_Worker], progress: Progress) -> None:
        task, worker.task = worker.task, None
        took = time.monotonic() - task.started
        try:
            fault = worker.connection.recv()
        except (EOFError, OSError):
            pool.remove(worker)
            worker.process.join(timeout=10)
            fault = f"its process {_ending(worker.process.exitcode)}"
            if task.tries == 1:
                progress.say(f"{task.settings.name}: {fault}; it is tried once more")
                queue.append(task)
                return
        if fault:
            log = self.store.work(task.key) / "log.txt"
            progress.say(f"{task.settings.name} failed: {fault} (log: {log})")
            self.failed.append(f"{task.settings.name} ({fault})")
        progress.finished(task, None if fault else took)


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
        log_to(store.work(key) / "log.txt")
        try:
            store.put(key, settings, *executed(store, key, settings, code, data_root, execute))
            answer = ""
        except BaseException as fault:
            traceback.print_exc()
            sys.stderr.flush()
            answer = one_line(fault)
        connection.send(answer)


def log_to(path: Path) -> None:
    """From now on what this process prints, C code too, goes to the end of that file."""
    with path.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


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
