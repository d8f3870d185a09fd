"""The measurements of notebook 04 and of `vqlora bench`: which settings and arms, each measured apart.

    steps = measure_steps(models, arms, kept="build/cpu/cost", workers=2)      # bytes, FLOPs
    times = measure_times(models, arms, kept="build/cpu/cost")                 # seconds, one at a time
    dtypes = measure_dtypes(main, ("fp32",), aims, kept="build/cpu/cost")      # aims, in other dtypes too
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vqlora.cost.apart import apart
from vqlora.cost.bench import measure_arm, measure_rounds
from vqlora.cost.bench_inference import SERVED, measure_inference
from vqlora.cost.bench_tables import ratios
from vqlora.cost.claims import AIMS, judge_aims
from vqlora.precision import compute_dtype

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
    asked = [{**case, "arms": arms_of(model, case, arms), "rounds": model.rounds_of(case)}
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


def measure_dtypes(
    main: CostModel, dtypes: Sequence[str], aims: pd.DataFrame, *, kept: str | Path, workers: int = 1,
    say: Say = lambda _: None,
) -> pd.DataFrame:  # fmt: skip
    """`aims`, a row each as `judge_aims` gives them, by compute dtype: this machine's own, then `dtypes`.

    What costs depend on most, beside the model, is whether a processor multiplies 16-bit numbers.
    """
    tables = {_own_dtype(): aims}
    case, arms = main.cases()[0], sorted({arm for pair in AIMS.values() for arm in pair[:2]})
    for dtype in [name for name in dtypes if name not in tables]:
        asked = [{**case, "arm": arm, "dtype": dtype} for arm in arms]
        steps = apart(measure_arm, asked, kept=kept, workers=workers, say=say)
        asked = [{**case, "arms": arms, "rounds": main.rounds, "dtype": dtype}]
        (times,) = apart(measure_rounds, asked, kept=kept, say=say)
        against = ratios(pd.DataFrame(steps), pd.DataFrame(times))
        tables[dtype] = judge_aims(against, main.model, main.at, main.rank)
    return pd.concat(tables, names=["dtype"]).reset_index("dtype").reset_index(drop=True)


def _own_dtype() -> str:
    import torch

    return compute_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu").name


def arms_of(model: CostModel, case: dict, arms: Sequence[str]) -> list[str]:
    """All arms at the model's own rank; at other ranks those of `RANKED`."""
    return [arm for arm in arms if case["rank"] == model.rank or arm in RANKED]


def gpu_paths() -> pd.DataFrame:
    """What wants a card, or a processor with 16-bit products: path, device, what, status."""
    import torch

    card, table = torch.cuda.is_available(), pd.DataFrame(GPU_PATHS, columns=["path", "device", "what"])
    run = (table["path"] == "bfloat16 products") & (_own_dtype() == "bf16") | card
    return table.assign(status=run.map({True: "run", False: "not run"}))
