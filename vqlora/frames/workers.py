"""Do one job per video file in several processes; a job that kills its process costs that job alone.

Workers are fresh interpreters running `python -m vqlora.frames.workers`, fed one line of JSON a job. Nothing
is forked (decoders do not survive it) and the caller's script is not imported again, so it needs no main
guard.
"""
from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Job = dict[str, Any]


def run_jobs(function: str, jobs: Sequence[Job], *, workers: int | None = None,
             each: Callable[[int, dict], None]) -> None:
    """Call `module:function` on every job, in `workers` processes.

    Jobs (with a `path` each) and results are JSON objects; `each(index, result)` is called in this process,
    one at a time, as results arrive. A job whose process dies gives `{"died": exit code}`; an exception in
    the function is raised here. By default there are as many workers as cores, fewer where the files are so
    few and small that starting a worker costs more than it saves; a single worker is this process itself.
    """
    workers = min(workers or _worth_starting(jobs), len(jobs))
    if workers <= 1:
        call = _load(function)
        for index, job in enumerate(jobs):
            each(index, call(job))
        return
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    done: queue.SimpleQueue[tuple[int, dict | BaseException] | None] = queue.SimpleQueue()
    stop = threading.Event()
    threads = [threading.Thread(target=_feed, args=(function, jobs, waiting, done, stop), daemon=True)
               for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(jobs)):
            index, result = done.get()
            if isinstance(result, BaseException):
                raise result
            if "error" in result:
                raise RuntimeError(f"{jobs[index]}: {result['error']}")
            each(index, result)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _worth_starting(jobs: Sequence[Job]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work_s = 0.01 * len(jobs)  # a 40-frame clip of 64x64; then about 10 MB/s of compressed video
    for job in jobs:
        if os.path.isfile(job["path"]):
            work_s += os.path.getsize(job["path"]) / 1e7
    return min(cores, max(1, int(work_s)))  # starting one takes the better part of a second


def _feed(function: str, jobs: Sequence[Job], waiting: queue.SimpleQueue, done: queue.SimpleQueue,
          stop: threading.Event) -> None:
    """One worker's side in the parent: hand out jobs, pass results on, start a new process when one dies."""
    process = None
    try:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            process = process or _start(function)
            try:
                process.stdin.write(json.dumps(jobs[index]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line.endswith("\n"):
                done.put((index, json.loads(line)))
            else:
                done.put((index, {"died": process.wait()}))
                process = None
    except BaseException as error:  # the parent waits for one answer a job: it must hear of this
        done.put((-1, error))
    finally:
        if process is not None:
            process.stdin.close()
            process.wait()


def _start(function: str) -> subprocess.Popen:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", __name__, function], stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)


def _load(function: str) -> Callable[[Job], dict]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _answers(function: str, lines: Iterator[str]) -> Iterator[dict]:
    call = _load(function)
    for line in lines:
        try:
            yield call(json.loads(line))
        except Exception as error:  # travels to the parent, which raises it
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a decoder prints must not mix with the answers
    for answer in _answers(sys.argv[1], iter(sys.stdin.readline, "")):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
