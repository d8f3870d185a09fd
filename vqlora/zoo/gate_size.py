"""What gates cost in parameters, counted on real layer shapes; no weights are made.

    gate_shares()       # model, gate, adapter_parameters, gate_parameters, gate_frac
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vqlora.adapter import VQLoraConfig
from vqlora.base import build_tokenizer, small_config
from vqlora.data.kinemoji.language import vocabulary
from vqlora.kinevlm import KineVLMForConditionalGeneration
from vqlora.optimizer import is_gate

if TYPE_CHECKING:
    import pandas as pd


def _kinevlm() -> nn.Module:
    return KineVLMForConditionalGeneration(small_config(len(build_tokenizer(vocabulary()))))


def _smolvlm() -> nn.Module:
    """SmolVLM-256M: SmolLM2-135M behind a SigLIP-base tower (sizes as published)."""
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
              "num_attention_heads": 12, "image_size": 512, "patch_size": 16}  # fmt: skip
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4)
    return SmolVLMForConditionalGeneration(config)


def _llava(hidden: int, layers: int, heads: int, kv: int, mlp: int) -> nn.Module:
    """LLaVA-OneVision: Qwen2 behind a SigLIP-so400m tower (sizes as published)."""
    text = {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "vocab_size": 152000}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
              "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
              "vision_use_head": False}  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(text_config=text, vision_config=vision)
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "KineVLM": _kinevlm,
    "SmolVLM 256M": _smolvlm,
    "LLaVA-OneVision 0.5B": lambda: _llava(896, 24, 14, 2, 4864),
    "LLaVA-OneVision 7B": lambda: _llava(3584, 28, 28, 4, 18944),
}


def gate_shares(rank: int = 8, gates: tuple[str, ...] = ("scalar", "rank", "mixture")) -> pd.DataFrame:
    """Trainable parameters with `rank` on attention and MLP of all parts, and the share that is gates.

    Returns:
        model, gate, rank, adapter_parameters (gates included), gate_parameters, gate_frac.
    """
    import pandas as pd

    rows = []
    for name, build in MODELS.items():
        for gate in gates:
            with torch.device("meta"):
                model = get_peft_model(build(), VQLoraConfig(r=rank, gate=gate), low_cpu_mem_usage=True)
            counts = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
            total, own = sum(counts.values()), sum(n for key, n in counts.items() if is_gate(key))
            rows.append((name, gate, rank, total, own, own / total))
    columns = ["model", "gate", "rank", "adapter_parameters", "gate_parameters", "gate_frac"]
    return pd.DataFrame(rows, columns=columns)
