"""The measurements of notebook 04 and of `vqlora bench`: which settings and arms, each measured apart.

    steps = measure_steps(models, arms, kept="build/cpu/cost", workers=2)      # bytes, FLOPs
    times = measure_times(models, arms, kept="build/cpu/cost")                 # seconds, one at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vqlora.cost.apart import apart
from vqlora.cost.bench import measure_arm, measure_rounds
from vqlora.cost.bench_inference import SERVED, measure_inference

if TYPE_CHECKING:
    from vqlora.experiments import CostModel

RANKED = ("qlora", "vqlora+lean")  # arms whose cost is followed along ranks
Say = Callable[[str], None]
# Paths of a step that only a card takes, and what there is to say of them.
GPU_PATHS = (
    ("label positions, chunked head", "any device", "the same code as on the CPU"),
    ("low-rank products on 4-bit layers", "CUDA", "bitsandbytes' CUDA kernels in their place"),
    ("fused attention", "CUDA", "left to torch's own kernels"),
    ("paged and 8-bit AdamW", "CUDA", "chosen where a card is; AdamW elsewhere, the reason logged"),
    ("peak by the allocator's counters", "CUDA", "allocated and reserved, for each device"),
    ("bfloat16 products", "CUDA, or a CPU with bf16 units", "where hardware has them"),
)


def measure_steps(
    models: Sequence[CostModel], arms: Sequence[str], *, kept: str | Path, workers: int = 1,
    say: Say = lambda _: None,
) -> pd.DataFrame:  # fmt: skip
    """A row of `measure_arm` for every setting of the models and each of its arms."""
    asked = [{**case, "arm": arm} for model in models for case in model.cases()
             for arm in arms_of(model, case, arms)]  # fmt: skip
    return pd.DataFrame(apart(measure_arm, asked, kept=kept, workers=workers, say=say))


def measure_times(
    models: Sequence[CostModel], arms: Sequence[str], *, kept: str | Path, say: Say = lambda _: None
) -> pd.DataFrame:
    """Rows of `measure_rounds` for every setting of the models, one setting at a time."""
    asked = [{**case, "arms": arms_of(model, case, arms), "rounds": model.rounds}
             for model in models for case in model.cases()]  # fmt: skip
    rows = apart(measure_rounds, asked, kept=kept, say=say)
    return pd.DataFrame([row for part in rows for row in part])


def measure_answers(
    models: Sequence[CostModel], *, kept: str | Path, say: Say = lambda _: None
) -> pd.DataFrame:
    """A row of `measure_inference` for every way to serve each model: one clip, `at` frames."""
    asked = [{"model": model.model, "bits": bits, "merged": merged, "frames": model.at, "rank": model.rank}
             for model in models for bits, merged in SERVED]  # fmt: skip
    return pd.DataFrame(apart(measure_inference, asked, kept=kept, say=say))


def arms_of(model: CostModel, case: dict, arms: Sequence[str]) -> list[str]:
    """All arms at the model's own rank; at other ranks those of `RANKED`."""
    return [arm for arm in arms if case["rank"] == model.rank or arm in RANKED]


def gpu_paths() -> pd.DataFrame:
    """What was not run for want of a card: path, device, what, status."""
    import torch

    status = "run" if torch.cuda.is_available() else "not run"
    return pd.DataFrame(GPU_PATHS, columns=["path", "device", "what"]).assign(status=status)
