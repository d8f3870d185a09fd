"""What notebook 02 asks of the base's rival, `vqlora.stock_base`: its scores, and what either training costs.

    table = train_and_score(profile.stock, profile.base, out, clips, store)   # `results/02_base/stock.csv`
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer

from vqlora.base_check import score_base
from vqlora.config import PretrainSettings
from vqlora.data.cache import FrameStore
from vqlora.data.clips import Clip
from vqlora.pretrain import new_model, pretrain
from vqlora.pretrain_data import Pack, SourceClips
from vqlora.stock_base import StockModel


def step_seconds(recipe: PretrainSettings, steps: Sequence[int]) -> float:
    """CPU seconds of this process that forward and backward of the given steps' batches take, their mean."""
    model, tokenizer = new_model(recipe)
    clips, pack = SourceClips(recipe), Pack(tokenizer, model.config.tokens_per_frame)
    spent = []
    for step in (steps[0], *steps):  # the first one twice: it warms up
        batch = pack([clips[step * recipe.batch_size + i] for i in range(recipe.batch_size)])
        began = time.process_time()
        model(**batch)["loss"].backward()
        spent.append(time.process_time() - began)
        model.zero_grad(set_to_none=True)
    return sum(spent[1:]) / len(steps)


def costs(recipe: PretrainSettings) -> dict[str, float]:
    """What a training costs by its steps: step_s of either stage, and both together in CPU seconds, drawing
    of the clips left out (it is the same for all)."""
    first, second = [0, 1, 2], [recipe.vision_steps + i for i in range(len(recipe.frames))]
    seeing, joint = step_seconds(recipe, first), step_seconds(recipe, second)
    whole = recipe.vision_steps * seeing + (recipe.steps - recipe.vision_steps) * joint
    return {"vision_step_s": seeing, "joint_step_s": joint, "train_cpu_s": whole}


def train_and_score(
    stock: PretrainSettings, own: PretrainSettings, out: str | Path, clips: tuple[Clip, ...],
    store: FrameStore
) -> pd.DataFrame:
    """Train the stock class by `stock`: base, frames, metric, value are its scores, then what either recipe
    costs, measured one after the other in this process. `out` keeps the training, which can be resumed.
    """
    folder = pretrain(stock, Path(out))
    model = StockModel.from_pretrained(folder, dtype=torch.float32).eval()
    scores = score_base(model, AutoTokenizer.from_pretrained(folder), clips, store)
    rows = scores.melt(id_vars="frames", var_name="metric", value_name="value").assign(base="stock")
    spent = []
    for name, recipe in (("stock", stock), ("own", own)):
        counted = sum(p.numel() for p in new_model(recipe)[0].bare().parameters())
        found = {**costs(recipe), "steps": recipe.steps, "parameters": counted}
        spent += [{"base": name, "frames": "training", "metric": key, "value": value}
                  for key, value in found.items()]  # fmt: skip
    return pd.concat([rows, pd.DataFrame(spent)])[["base", "frames", "metric", "value"]]
