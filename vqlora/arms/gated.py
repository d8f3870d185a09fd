"""Our adapter, with gates: the arm `vqlora` where no allocator reads its ranks off data."""

from __future__ import annotations

from torch import nn

from vqlora.adapter import VQLoraConfig


def configure(model: nn.Module, settings, batches) -> VQLoraConfig:
    """The ranks of `settings` on the layers of its modalities; `batches` are not asked for."""
    return config_of(settings)


def config_of(settings) -> VQLoraConfig:
    """Our adapter with the same ranks on the same layers as `baselines.lora_config`'s, and gates."""
    return VQLoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        modalities=settings.modalities,
        layers=settings.layers,
        gate=settings.gate,
        gate_modalities=settings.gate_modalities,
        control=settings.control,
        control_seed=settings.seed,
        features=settings.gate_features,
        ranks=settings.ranks,
        rank_ratio=settings.rank_ratio,
        budget=settings.budget,
    )
