"""What well-known models would take, by their published shapes, and the method description's table.

    known_sizes()        # one row per model and way of training: predictions, nothing here was measured
    stated_sizes()       # the description's memory table beside predictions, with a verdict on each row

Shapes are written out by hand from the models' public configurations; no checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from transformers import (
    LlamaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    SmolVLMConfig,
)

from vqlora.cost.plan import MemoryPlan, plan_memory

if TYPE_CHECKING:
    import pandas as pd

GB = 1e9


def _text(hidden: int, layers: int, heads: int, kv: int, mlp: int, vocabulary: int, **more) -> dict:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
             "num_key_value_heads": kv, "intermediate_size": mlp, "vocab_size": vocabulary}  # fmt: skip
    return {**sizes, **more}


_QWEN = 151936  # ids of the Qwen2.5 and Qwen3 families; from 7B on Qwen2.5 has 152064
_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384,
           "patch_size": 14}  # fmt: skip


def _llava_onevision(text: dict) -> LlavaOnevisionConfig:
    vision = {"model_type": "siglip_vision_model", **_SIGLIP, "num_hidden_layers": 26,
              "vision_use_head": False}  # fmt: skip
    return LlavaOnevisionConfig(text_config={"model_type": "qwen2", **text}, vision_config=vision)


def _smolvlm2() -> SmolVLMConfig:
    text = {"model_type": "llama", **_text(2048, 24, 32, 32, 8192, 49280)}
    vision = {**_SIGLIP, "num_hidden_layers": 27}
    return SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3, image_token_id=49190)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = _text(3584, 28, 28, 4, 18944, 152064, rope_parameters=rope)
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584}  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=151655,
                            video_token_id=151656, vision_start_token_id=151652,
                            vision_end_token_id=151653)  # fmt: skip


CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "Qwen2.5-0.5B": lambda: Qwen2Config(**_text(896, 24, 14, 2, 4864, _QWEN, tie_word_embeddings=True)),
    "Qwen3-0.6B": lambda: Qwen3Config(
        **_text(1024, 28, 16, 8, 3072, _QWEN, head_dim=128, tie_word_embeddings=True)
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(**_text(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True)),
    "Qwen2.5-3B": lambda: Qwen2Config(**_text(2048, 36, 16, 2, 11008, _QWEN, tie_word_embeddings=True)),
    "Qwen2.5-7B": lambda: Qwen2Config(**_text(3584, 28, 28, 4, 18944, 152064)),
    "Llama-2-13B": lambda: LlamaConfig(**_text(5120, 40, 40, 40, 13824, 32000)),
    "LLaVA-OneVision-0.5B": lambda: _llava_onevision(_text(896, 24, 14, 2, 4864, 152000)),
    "SmolVLM2-2.2B": _smolvlm2,
    "LLaVA-OneVision-7B": lambda: _llava_onevision(_text(3584, 28, 28, 4, 18944, 152128)),
    "Qwen2.5-VL-7B": _qwen2_5_vl,
}
WAYS: Mapping[str, dict] = {
    "QLoRA, checkpointed": {"bits": "nf4", "gradient_checkpointing": True},
    "QLoRA": {"bits": "nf4"},
    "LoRA in bf16, checkpointed": {"bits": "bf16", "gradient_checkpointing": True},
    "full": {"full": True, "gradient_checkpointing": True},
}


def known_sizes(
    names: tuple[str, ...] = tuple(CONFIGS), ways: tuple[str, ...] = tuple(WAYS), **settings
) -> pd.DataFrame:
    """Predictions for one clip of 8 frames (text models: 512 tokens) a step, on a card.

    settings: more arguments of `plan_memory`, for all rows. A 7B model takes some ten seconds a row.

    Returns:
        model, way, parameters, trainable, tokens, and in GB (10^9 bytes): weights (constants included),
        adapters, optimizer, gradients, activations, logits, training peak, generation peak; step_tflop and
        token_gflop.
    """
    import pandas as pd

    rows = []
    for name in names:
        for way in ways:
            plan = _plan(name, **{**WAYS[way], **settings})
            parts = {key: plan.training[key] / GB for key in ("adapters", "optimizer", "gradients",
                                                              "activations", "logits")}  # fmt: skip
            weights = (plan.training["weights"] + plan.training["constants"]) / GB
            rows.append({
                "model": name, "way": way, "parameters": plan.parameters, "trainable": plan.trainable,
                "tokens": plan.tokens, "weights": weights, **parts,
                "training peak": plan.train_bytes / GB, "generation peak": plan.inference_bytes / GB,
                "step_tflop": plan.step_flops / 1e12, "token_gflop": plan.token_flops / GB,
            })  # fmt: skip
    return pd.DataFrame(rows)


# The method description's table: size -> GB it states for "FP16" and for QLoRA; a reduction of 60% in each.
STATED: Mapping[str, tuple[str, float, float]] = {
    "0.5B": ("Qwen2.5-0.5B", 2.0, 0.8),
    "1B": ("Llama-3.2-1B", 4.0, 1.6),
    "3B": ("Qwen2.5-3B", 12.0, 4.8),
    "7B": ("Qwen2.5-7B", 28.0, 11.2),
}
_LEAN = {"prompt": 96, "answer": 32, "gradient_checkpointing": True, "optimizer": "paged_adamw_8bit"}
_RICH = {"prompt": 480, "answer": 32, "batch": 4}


def stated_sizes() -> pd.DataFrame:
    """Each row of the description's table beside the range that predictions span, with verdicts.

    The description says neither tokens nor batch nor rank, so its QLoRA figures are held against a range:
    from lean (one row of 128 tokens, checkpointing, 8-bit optimizer, rank 8) to rich (four rows of 512
    tokens, neither). Its "FP16" figures are 4 bytes a parameter; full training with AdamW takes 16, and
    activations.

    Returns:
        size, model, stated_fp16_gb, weights_16bit_gb, full_gb (lean), fp16_verdict, stated_qlora_gb, lean_gb,
        rich_gb, qlora_verdict, reduction_frac (lean QLoRA against lean full training), why.
    """
    import pandas as pd

    rows = []
    for size, (name, fp16, qlora) in STATED.items():
        full = _plan(name, **{**_LEAN, "full": True, "optimizer": "adamw_torch"})
        lean, rich = _plan(name, **_LEAN), _plan(name, **_RICH)
        low, high = lean.train_bytes / GB, rich.train_bytes / GB
        rows.append({
            "size": size, "model": name,
            "stated_fp16_gb": fp16, "weights_16bit_gb": 2 * full.parameters / GB,
            "full_gb": full.train_bytes / GB, "fp16_verdict": _fp16(fp16, full),
            "stated_qlora_gb": qlora, "lean_gb": low, "rich_gb": high,
            "qlora_verdict": _within(qlora, low, high),
            "reduction_frac": 1 - lean.train_bytes / full.train_bytes,
            "why": _why(fp16, qlora, full, low, high),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _plan(name: str, **settings) -> MemoryPlan:
    config = CONFIGS[name]()
    video = getattr(config, "vision_config", None) is not None
    length = {"prompt": 64, "answer": 32} if video else {"frames": 0, "prompt": 448, "answer": 64}
    # widths that are no multiple of 64 are packed on a card; on CPU they would have to stay in 16 bits
    return plan_memory(config, **{**length, "device": "cuda", **settings})


def _fp16(stated: float, full: MemoryPlan) -> str:
    weights = 2 * full.parameters / GB
    if stated >= 0.9 * full.train_bytes / GB:
        return "plausible as full fine-tuning"
    return "plausible as weights alone" if stated < 1.2 * weights else "not"


def _within(stated: float, low: float, high: float) -> str:
    if stated < low:
        return "not: less than the leanest setting"
    return "not: more than the richest setting" if stated > high else "plausible"


def _why(fp16: float, qlora: float, full: MemoryPlan, low: float, high: float) -> str:
    share = fp16 * GB / full.parameters
    first = (
        f"{fp16:g} GB are {share:.1f} bytes a parameter: weights and gradients in 16 bits, without optimizer "
        f"state ({8 * full.parameters / GB:.1f} GB for AdamW) and activations"
    )
    second = f"{qlora:g} GB against {low:.1f} to {high:.1f} GB"
    return f"{first}; {second}, as tokens, batch and rank are not stated"
