"""The line that tells how far a grid of runs is, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from vqlora.console import duration
from vqlora.grid.task import Task


class Progress:
    """A bar over `total` runs, of which `made` were there before, `workers` at a time."""

    def __init__(self, total: int, made: int, workers: int):
        self.workers = workers
        self.done: list[tuple[float, float]] = []  # (expected, measured) seconds
        form = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"
        self.bar = tqdm(total=total, initial=made, desc="runs", file=sys.stderr, dynamic_ncols=True,
                        mininterval=0, bar_format=form)  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, queue: Sequence[Task], running: Sequence[Task]) -> None:
        """Renew the line."""
        self.bar.set_postfix_str(self.left(queue, running))

    def say(self, text: str) -> None:
        """A line of its own above the bar."""
        self.bar.write(text, file=sys.stderr)

    def finished(self, task: Task, took_s: float | None) -> None:
        """One run more; `took_s` is None for one that failed."""
        if took_s is not None:
            self.done.append((task.expected_s, took_s))
        self.bar.update()

    def left(self, queue: Sequence[Task], running: Sequence[Task]) -> str:
        """Time left: expected seconds, corrected by the runs that are finished and those that are overdue."""
        now = time.monotonic()
        typical = sum(task.expected_s for task in (*queue, *running)) / max(1, len(queue) + len(running))
        late = [(task.expected_s, 1.25 * (now - task.started)) for task in running
                if now - task.started > task.expected_s]  # fmt: skip
        guessed, took = (sum(times) for times in zip(*self.done, *late, (typical, typical), strict=True))
        factor = took / guessed
        left = [max(factor * task.expected_s - (now - task.started), 0.1 * factor * task.expected_s)
                for task in running]  # fmt: skip
        total = sum(left) + factor * sum(task.expected_s for task in queue)
        names = ", ".join(task.settings.name.split("/", 1)[1] for task in running)
        text = f"about {duration(max([total / self.workers, *left]))} left"
        return f"{text}; now {names}" if names else text
