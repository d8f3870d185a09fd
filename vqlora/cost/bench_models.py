"""The models whose training steps are compared: the embedded base, and a decoder of real size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration


def _kinevlm() -> nn.Module:
    from vqlora.base import load_base

    return load_base("released")[0]


def _smolvlm() -> nn.Module:
    """SmolLM2-135M's decoder (Allal et al. 2025, arXiv:2502.02737) behind a tower of 3M parameters; frames of
    288 x 288 pixels, 36 tokens each."""
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280,
            "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
              "image_size": 288, "patch_size": 16}  # fmt: skip
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3, tie_word_embeddings=True,
                           image_token_id=49152)  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


MODELS: Mapping[str, Callable[[], nn.Module]] = {"KineVLM": _kinevlm, "SmolVLM-135M": _smolvlm}
