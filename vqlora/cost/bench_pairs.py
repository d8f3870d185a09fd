"""Plain and lean steps of one model in one process, in turn: the ratio of their times with least noise.

    rows = bench_pairs(model="SmolVLM-135M", frames=[8, 16], work="build/bench", pairs=5)
    pair_table(rows)                              # median, low, high of lean / plain
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vqlora.cost.bench import build_arm, elsewhere, prepare_source
from vqlora.cost.inputs import clip_batch
from vqlora.step import lean_step

if TYPE_CHECKING:
    import pandas as pd


def measure_pairs(
    source: Path, *, pairs: int, frames: int, rank: int = 8, batch: int = 1, prompt: int = 32,
    answer: int = 32,
) -> dict:  # fmt: skip
    """CPU seconds [plain, lean] of `pairs` steps each (forward, backward, AdamW), after one that is not
    counted; plain and lean take turns at going first.
    """
    model = build_arm("qlora", source, rank)
    base = model.get_base_model()
    inputs = clip_batch(base, batch, frames, prompt, answer)
    inputs = {key: value.contiguous().to(base.device) for key, value in inputs.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        began = time.process_time()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began

    def lean() -> float:
        with lean_step(model):
            return step()

    step()
    found = []
    for number in range(pairs):
        taken = {call: call() for call in ((step, lean) if number % 2 == 0 else (lean, step))}
        found.append([taken[step], taken[lean]])
    return {"pairs_s": found, "frames": frames, "rank": rank, "batch": batch}


def bench_pairs(
    *, model: str, frames: Iterable[int], work: str | Path, pairs: int = 5, rank: int = 8, batch: int = 1,
    timeout_s: float = 1800.0, say: Callable[[str], None] = lambda _: None,
) -> list[dict]:  # fmt: skip
    """Rows of `measure_pairs`, one a number of frames, each from a process of its own."""
    source, rows = prepare_source(model, Path(work)), []
    for count in frames:
        wanted = {"pairs": pairs, "frames": count, "rank": rank, "batch": batch}
        rows.append({"model": model, **elsewhere(source, wanted, timeout_s)})
        say(f"{model} {count} frames, (plain, lean) CPU-s: {rows[-1]['pairs_s']}")
    return rows


def pair_table(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Per setting: plain_cpu_s and lean_cpu_s (medians), and lean / plain within pairs: median, low, high."""
    import numpy as np
    import pandas as pd

    found = []
    for row in rows:
        plain, lean = np.array(row["pairs_s"]).T
        ratio = lean / plain
        found.append({"model": row["model"], "frames": row["frames"], "rank": row["rank"],
                      "plain_cpu_s": np.median(plain), "lean_cpu_s": np.median(lean),
                      "median": np.median(ratio), "low": ratio.min(), "high": ratio.max(),
                      "pairs": len(ratio)})  # fmt: skip
    return pd.DataFrame(found)
