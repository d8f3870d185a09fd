"""The constants that standardise frame features, measured on a training set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vqlora.adapter.config import VQLoraConfig
from vqlora.adapter.context import raw_features
from vqlora.rows import frame_rows

FLOOR = 1e-6  # a feature that never changes is centred, not blown up


def calibrate_features(
    model: nn.Module, config: VQLoraConfig, batches: Iterable[Mapping[str, Any]]
) -> VQLoraConfig:
    """A copy of `config` whose `feature_mean` and `feature_std` are those of all frames in `batches`.

    Batches are keyword arguments of the model's forward; with `features="scores"` they hold `frame_features`.
    The model itself is not run. Raises ValueError if no batch shows a frame.
    """
    count, total, squares = 0, 0.0, 0.0
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for batch in batches:
        inputs = dict(batch)
        scores = inputs.pop("frame_features", None)
        rows = frame_rows(model, inputs)
        if rows is None:
            continue
        found = raw_features(model, inputs, scores, rows, config).double().cpu()
        count, total, squares = count + len(found), total + found.sum(0), squares + found.square().sum(0)
    if not count:
        raise ValueError("batches: none of them shows a frame")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    filled = copy.copy(config)
    filled.feature_mean = mean.tolist()
    filled.feature_std = torch.where(std > FLOOR, std, torch.ones_like(std)).tolist()
    return filled
