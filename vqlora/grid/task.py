"""One run of a grid: what it is, and making it in this process."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqlora import processes
from vqlora.config import RunSettings
from vqlora.hub import is_hub
from vqlora.identity import provenance
from vqlora.store import RunResult, RunStore

Execute = Callable[[RunSettings, Path, Path], Any]           # (settings, data_root, work) -> RunResult
# Of processes that make runs. Threads must be set before torch is imported, as OMP_NUM_THREADS.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
               "PYTHONWARNINGS": "ignore"}


@dataclass
class Task:
    """A run that is to be made, under its key."""

    key: str
    settings: RunSettings
    code: str
    expected_s: float
    tries: int = 0
    started: float = 0.0


def executed(store: RunStore, key: str, settings: RunSettings, code: str, data_root: Path,
             execute: Execute | None = None) -> tuple[RunResult | None, dict[str, Any]]:
    """(result, provenance) of one run made here; a killed one goes on from what it left in its work folder.

    Of several processes that make it together only the first has the result. Where settings say so the
    trained model is saved, with its card.
    """
    execute = execute or importlib.import_module(module_of(settings)).execute
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


def _reporting(settings: RunSettings):
    """Around training: loggers beside TensorBoard, where some are asked for."""
    if not settings.report_to:
        return nullcontext()
    return importlib.import_module("vqlora.reporting").reporting(settings.report_to)


def module_of(settings: RunSettings) -> str:
    """Name of the module whose `execute` makes a run: checkpoints of the hub have their own."""
    if is_hub(settings.base) and (settings.generalizes or settings.sound):
        raise ValueError("languages, also_*, sound: go with the embedded base alone; allowed: none of them")
    own = "vqlora.general.run" if settings.generalizes else "vqlora.train"
    return "vqlora.hub.run" if is_hub(settings.base) else own


def one_line(fault: BaseException) -> str:
    """Kind and first line of what went wrong."""
    return f"{type(fault).__name__}: {(str(fault).strip().splitlines() or ['no message'])[0]}"
