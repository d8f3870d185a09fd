"""The arm `vqlora` with ranks read off data, as `vqlora.baselines` puts it on a base and trains it."""

from __future__ import annotations

from torch import nn

from vqlora.adapter import gated_layers
from vqlora.adapter.config import VQLoraConfig
from vqlora.arms.gated import config_of
from vqlora.base import load_base
from vqlora.losses import batch_loss
from vqlora.ranks.allocate import allocate_ranks
from vqlora.ranks.scheduler import RankScheduler, with_room
from vqlora.ranks.signals import quantization_errors

SCHEDULED = "scheduled"  # in place of an allocator: uniform at first, moved while training


def configure(model: nn.Module, settings, batches) -> VQLoraConfig:
    """The config with a rank for every layer, from batches that `batches()` gives when they are needed."""
    if settings.ranks == SCHEDULED:
        return with_room(model, config_of(settings.model_copy(update={"ranks": "uniform"})))
    config, parts = config_of(settings), set(settings.ranks.split("+"))
    errors = None
    if "quantization" in parts:
        errors = quantization_errors(load_base(settings.base)[0], bits=settings.bits)
    return allocate_ranks(
        model,
        config,
        () if parts <= {"uniform", "ratio", "quantization"} else batches(),
        loss=lambda model, batch: batch_loss(model, batch, settings.contrastive_weight)[0],
        errors=errors,
    )


def begin(model: nn.Module, settings, batches) -> None:
    """Nothing more to do once the adapter is on."""


def callbacks(model: nn.Module, settings) -> list:
    if settings.ranks != SCHEDULED:
        return []
    return [RankScheduler(budget=settings.budget, steps=settings.steps)]


def ranks(model: nn.Module) -> dict[str, int]:
    """Ranks in use by full name; 0 where the allocator gave none."""
    config = model.peft_config["default"]
    found = {name: layer.r["default"] for name, layer in gated_layers(model)}
    return {name: config.ranks[name] if name in found else 0 for name in config.ranks}
