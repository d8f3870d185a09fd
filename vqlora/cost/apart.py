"""Measurements, each in a process of its own and kept: clocks and resident sets hold nothing of others.

    apart(measure_arm, [{"model": "KineVLM", "arm": "qlora", "frames": 8}], kept="build/cost", workers=2)

Processes are forked from one that has the libraries loaded and nothing else, so that each costs no start.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vqlora.identity import code_hash, digest
from vqlora.store import whole_file


def apart(
    measure: Callable[..., Any],
    asked: Iterable[Mapping[str, Any]],
    *,
    kept: str | Path,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> list[Any]:
    """measure(**settings, work=kept) for each of `asked`, on one thread, `workers` at a time.

    measure: a function of a module, whose result is JSON. kept: folder of what was measured; a setting is
    measured again only when its code changed. Raises what `measure` raises, of the first that fails.
    """
    asked, kept = [dict(settings) for settings in asked], Path(kept)
    paths = [_file(measure, settings, kept) for settings in asked]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    context = get_context("forkserver")
    context.set_forkserver_preload(["peft", "bitsandbytes", measure.__module__])
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        running = [(number, pool.submit(_measure, measure, asked[number], kept)) for number in missing]
        for number, future in running:
            found = json.dumps(future.result())
            with whole_file(paths[number]) as part:
                part.write_text(found, encoding="utf-8")
            say(f"{measure.__name__} {' '.join(f'{key}={value}' for key, value in asked[number].items())}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _file(measure: Callable, settings: dict, kept: Path) -> Path:
    made_by = digest(measure.__qualname__, settings, code_hash([measure.__module__]))
    return kept / f"{measure.__name__}-{made_by}.json"


def _measure(measure: Callable, settings: dict, kept: Path):
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return measure(**settings, work=kept)
