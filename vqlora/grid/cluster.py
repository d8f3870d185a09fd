"""The same grid on a Ray cluster: every run is a task that asks for as many CPUs as it has threads, and a GPU
where the cluster has any. Ray places it, and gives it to another node once where its process or node dies.

    pip install 'vqlora[ray]'; ray start --head             # on other machines: ray start --address=HOST:6379
    run_grid(runs, store, profile, cluster="auto")

Store and data must lie on a file system that all nodes see under one path: a run is stored by the node that
made it, so that it is finished even if nobody waits for it any more.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from vqlora.config import ConfigError, RunSettings
from vqlora.grid.local import REFRESH_S, log_to
from vqlora.grid.progress import Progress
from vqlora.grid.task import ENVIRONMENT, Execute, Task, executed, module_of, one_line
from vqlora.identity import code_hash
from vqlora.store import RunStore


@dataclass
class Cluster:
    """Hands all tasks to the Ray cluster at `address` ("auto": the one that this machine is a part of)."""

    store: RunStore
    data_root: Path
    execute: Execute | None
    address: str
    failed: list[str] = field(default_factory=list)

    def make(self, tasks: list[Task], total: int) -> list[str]:
        """Make and store all runs; returns one `name (reason)` per run that could not be made.

        total: runs of the grid, those included that were there before. Raises ConfigError where Ray is not
        installed or nothing answers at the address.
        """
        ray, ours = _connected(self.address)
        self.store.root.mkdir(parents=True, exist_ok=True)  # the nodes look for it
        try:
            have = ray.cluster_resources()
            queue = sorted(tasks, key=lambda task: -task.expected_s)  # long ones first: a shorter tail
            waiting = {self._submit(ray, task, have): task for task in queue}
            with Progress(total, total - len(tasks), max(1, int(have.get("CPU", 1)))) as progress:
                while waiting:
                    progress.show(list(waiting.values()), [])
                    for done in ray.wait(list(waiting), timeout=REFRESH_S)[0]:
                        self._collect(ray, done, waiting.pop(done), progress)
        finally:
            if ours:
                ray.shutdown()
        return self.failed

    def _submit(self, ray, task: Task, have: dict[str, float]):
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(task.settings.threads)}
        remote = ray.remote(_made).options(
            num_cpus=task.settings.threads, num_gpus=int(have.get("GPU", 0) > 0), max_retries=1,
            name=task.settings.name, runtime_env={"env_vars": environment})  # fmt: skip
        modules = [self.execute.__module__ if self.execute else module_of(task.settings)]
        folders = [str(path.resolve()) for path in (self.store.root, self.data_root)]
        return remote.remote(
            task.key, task.settings, task.code, *folders, self.execute, modules, code_hash(modules)
        )

    def _collect(self, ray, done, task: Task, progress: Progress) -> None:
        try:
            fault, took = ray.get(done)
        except ray.exceptions.RayTaskError as unable:  # before the run began, as on a node without vqlora
            fault, took = str(unable).strip().splitlines()[-1], None
        except ray.exceptions.RayError as died:
            fault, took = f"its process or node died, and again: {one_line(died)}", None
        if fault:
            log = self.store.work(task.key) / "log.txt"
            progress.say(f"{task.settings.name} failed: {fault} (log: {log})")
            self.failed.append(f"{task.settings.name} ({fault})")
        progress.finished(task, None if fault else took)


def _connected(address: str):
    """Ray, connected, and whether it was this call that connected it."""
    try:
        import ray
    except ImportError:
        raise ConfigError(f"cluster: {address!r} needs Ray: pip install 'vqlora[ray]'") from None
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, TimeoutError) as fault:
        raise ConfigError(f"cluster: no Ray cluster at {address!r} ({one_line(fault)}); `ray start --head` "
                          "starts one, allowed: auto or HOST:PORT") from fault  # fmt: skip
    return ray, True


def _made(key: str, settings: RunSettings, code: str, root: str, data_root: str, execute: Execute | None,
          modules: list[str], wanted: str) -> tuple[str, float]:  # fmt: skip
    """On some node: make one run and store it. ("" or the fault in a line, seconds)."""
    began, store, node = time.monotonic(), RunStore(root), socket.gethostname()
    if not Path(data_root).is_dir() or not store.root.is_dir():
        missing = next(path for path in (root, data_root) if not Path(path).is_dir())
        return f"{missing}: is not there on node {node}; all nodes need one file system", 0.0
    if code_hash(modules) != wanted:
        return f"node {node} has another version of vqlora", 0.0
    if store.get(key) is None:  # a node that died may have stored it before
        log_to(store.work(key) / "log.txt")
        try:
            store.put(key, settings, *executed(store, key, settings, code, Path(data_root), execute))
        except Exception as fault:
            traceback.print_exc()
            sys.stderr.flush()
            return one_line(fault), 0.0
    return "", time.monotonic() - began
