"""The gated, modality-aware QLoRA as a peft method. Importing this makes it known to peft."""

from __future__ import annotations

from peft import mapping

from vqlora.adapter.config import VQLoraConfig, VQLoraPeftType
from vqlora.adapter.context import FrameContext, frame_features, watch
from vqlora.adapter.features import calibrate_features
from vqlora.adapter.layer import GatedLayer
from vqlora.adapter.model import VQLoraModel, effective_ranks, gated_layers, gates
from vqlora.cache_rows import join_rows, take_rows

__all__ = [
    "FrameContext", "GatedLayer", "VQLoraConfig", "VQLoraModel", "VQLoraPeftType",
    "calibrate_features", "effective_ranks", "frame_features", "gated_layers", "gates", "join_rows",
    "take_rows", "watch",
]  # fmt: skip

# peft's own registration takes only names of its own list; these tables are what it reads.
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[VQLoraPeftType.VQLORA] = VQLoraConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[VQLoraPeftType.VQLORA] = VQLoraModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[VQLoraPeftType.VQLORA] = VQLoraModel.prefix
