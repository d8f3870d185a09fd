"""Stand-ins for one run, importable by the worker processes that `run_grid` spawns."""
import os
import signal
import time
from pathlib import Path

from vqlora.store import RunResult


def quick(settings, data_root, work):
    """Finishes at once with numbers that depend on the settings alone; counts its calls in a file."""
    with Path(data_root, "calls.txt").open("a") as calls:
        calls.write(f"{settings.name}\n")
    return RunResult({"nll": 1.0 + settings.seed, "clips": float(settings.eval_clips)}, {"steps_s": 0.1})


def faulty(settings, data_root, work):
    """Seed 1 raises, seed 2 is killed each time, seed 3 the first time only; others are slow and well."""
    if settings.seed == 1:
        raise ValueError("the loss is not a number\nsecond line")
    if settings.seed == 2 or settings.seed == 3 and not (work / "was_here").exists():
        (work / "was_here").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return quick(settings, data_root, work)


def chatty(settings, data_root, work):
    """Prints, then waits long enough to be killed with its parent."""
    print("hello from the run", flush=True)
    (work / "pid").write_text(str(os.getpid()))
    time.sleep(30)
    return quick(settings, data_root, work)
