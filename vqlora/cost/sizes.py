"""What well-known models would take, by their published shapes, and the memory claims under test.

    known_sizes()        # one row per model and way of training: predictions, nothing here was measured
    stated_sizes()       # the claims beside predictions, with a verdict on each row

Shapes are written out by hand from the models' public configurations; no checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

from peft import LoraConfig
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
    names: Sequence[str] = (), ways: Sequence[str] = tuple(WAYS), *, workers: int = 1, **settings
) -> pd.DataFrame:
    """Predictions for one clip of 8 frames (text models: 512 tokens) a step, on a card.

    names: of `CONFIGS`, all unless given. settings: more arguments of `plan_memory`, for all rows. A 7B model
        takes some ten seconds a row. workers: processes that plan at a time.

    Returns:
        model, way, parameters, trainable, tokens, and in GB (10^9 bytes): weights (constants included),
        adapters, optimizer, gradients, activations, logits, training peak, generation peak; step_tflop and
        token_gflop.
    """
    import pandas as pd

    asked = [(name, way, {**WAYS[way], **settings}) for name in names or CONFIGS for way in ways]
    return pd.DataFrame(_in_processes(_known, asked, workers))


def _known(name: str, way: str, settings: dict) -> dict:
    plan = _plan(name, **settings)
    told = ("adapters", "optimizer", "gradients", "activations", "logits")
    return {
        "model": name, "way": way, "parameters": plan.parameters, "trainable": plan.trainable,
        "tokens": plan.tokens, "weights": (plan.training["weights"] + plan.training["constants"]) / GB,
        **{key: plan.training[key] / GB for key in told},
        "training peak": plan.train_bytes / GB, "generation peak": plan.inference_bytes / GB,
        "step_tflop": plan.step_flops / 1e12, "token_gflop": plan.token_flops / GB,
    }  # fmt: skip


def _in_processes(job: Callable[..., dict], asked: Sequence[tuple], workers: int) -> list[dict]:
    if workers == 1:
        return [job(*one) for one in asked]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(job, *zip(*asked, strict=True)))


# The memory claims under test, as a description of the method states them: size -> model, GB "in FP16", GB
# with QLoRA. What the first column means it shows by an example of 0.6B: weights and gradients of full
# fine-tuning in 16 bits.
STATED: Mapping[str, tuple[str, float, float]] = {
    "0.5B": ("Qwen2.5-0.5B", 2.0, 0.8),
    "1B": ("Llama-3.2-1B", 4.0, 1.6),
    "3B": ("Qwen2.5-3B", 12.0, 4.8),
    "7B": ("Qwen2.5-7B", 28.0, 11.2),
}
EXAMPLE = {"0.6B": ("Qwen3-0.6B", 2.4, 0.4)}
ADVISED = {"0.5B": 64, "0.6B": 64, "1B": 64, "3B": 128, "7B": 128}  # the ranks that the same source advises
LEAST = 6  # bytes a parameter of full training: weights and gradients in 16 bits, two moments in 8
_LEAN = {"prompt": 96, "answer": 32, "gradient_checkpointing": True}
_RICH = {"prompt": 480, "answer": 32, "batch": 4}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def stated_sizes(names: Sequence[str] = (), *, workers: int = 1) -> pd.DataFrame:
    """Each memory claim under test beside predictions, with a verdict on each number and on the row.

    The claims name neither tokens nor batch nor, in their table, a rank, so a figure for QLoRA is held
    against the range from lean (one row of 128 tokens, checkpointing, 8-bit optimizer, rank 8 on attention
    alone) to rich (four rows of 512 tokens, neither, rank 256 on every layer): outside it is denied, inside
    undecided. A figure "in FP16" is denied below `LEAST` bytes a parameter, which full training with AdamW
    cannot go under; a reduction is held against those of lean and rich training. Nothing here was measured.
    names: only the claims about these models of `CONFIGS`, all unless given.

    Returns:
        size, model, parameters, stated_fp16_gb, least_gb, full_gb (lean, as planned: float32 masters and
        AdamW), fp16_verdict, stated_qlora_gb, lean_gb, advised_gb (lean, but of the advised rank), rich_gb,
        qlora_verdict, stated_reduction_frac, lean_reduction_frac, rich_reduction_frac, reduction_verdict,
        verdict (of the row: its worst), why.
    """
    import pandas as pd

    claims = {**STATED, **EXAMPLE}
    asked = [(size, *row) for size, row in claims.items() if not names or row[0] in names]
    return pd.DataFrame(_in_processes(_judge, asked, workers))


def _judge(size: str, name: str, fp16: float, qlora: float) -> dict:
    small = {**_LEAN, "optimizer": "paged_adamw_8bit"}
    lean = _plan(name, **small, adapter_config=_lora(8, list(_ATTENTION)))
    advised = _plan(name, **small, adapter_config=_lora(ADVISED[size], list(_ATTENTION)))
    rich = _plan(name, **_RICH, adapter_config=_lora(256, "all-linear"))
    full, full_rich = (_plan(name, **how, full=True) for how in (_LEAN, _RICH))
    least, stated_cut = LEAST * full.parameters / GB, 1 - qlora / fp16
    cuts = [1 - own.train_bytes / whole.train_bytes for own, whole in ((lean, full), (rich, full_rich))]
    verdicts = {
        "fp16_verdict": "denied" if fp16 < least else _within(fp16, least, full_rich.train_bytes / GB),
        "qlora_verdict": _within(qlora, lean.train_bytes / GB, rich.train_bytes / GB),
        "reduction_verdict": _within(stated_cut, *sorted(cuts)),
    }
    sizes_gb = {key: plan.train_bytes / GB for key, plan in
                (("lean_gb", lean), ("advised_gb", advised), ("rich_gb", rich))}  # fmt: skip
    return {
        "size": size, "model": name, "parameters": full.parameters,
        "stated_fp16_gb": fp16, "least_gb": least, "full_gb": full.train_bytes / GB,
        "stated_qlora_gb": qlora, **sizes_gb, "stated_reduction_frac": stated_cut,
        "lean_reduction_frac": cuts[0], "rich_reduction_frac": cuts[1], **verdicts,
        "verdict": "denied" if "denied" in verdicts.values() else "undecided",
        "why": _why(fp16, qlora, full, least, sizes_gb),
    }  # fmt: skip


def _lora(rank: int, layers: list[str] | str) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=layers, task_type="CAUSAL_LM")


def _plan(name: str, **settings) -> MemoryPlan:
    config = CONFIGS[name]()
    video = getattr(config, "vision_config", None) is not None
    length = {"prompt": 64, "answer": 32} if video else {"frames": 0, "prompt": 448, "answer": 64}
    # widths that are no multiple of 64 are packed on a card; on CPU they would have to stay in 16 bits
    return plan_memory(config, **{**length, "device": "cuda", **settings})


def _within(stated: float, low: float, high: float) -> str:
    """Undecided inside the range that unstated settings span, denied outside."""
    return "undecided" if low <= stated <= high else "denied"


def _why(fp16: float, qlora: float, full: MemoryPlan, least: float, sizes_gb: Mapping[str, float]) -> str:
    first = (
        f"{fp16:g} GB are {fp16 * GB / full.parameters:.1f} bytes a parameter, weights and gradients alone; "
        f"with AdamW's moments in 8 bits it is {least:.1f} GB before any activation"
    )
    low, advised, high = sizes_gb.values()
    if qlora < low:
        return f"{first}; {qlora:g} GB is less than the leanest setting takes ({low:.2f} GB)"
    reached = "enough" if qlora >= advised else "too little"
    second = f"{qlora:g} GB lies between {low:.2f} and {high:.1f} GB: tokens, batch and rank are not stated"
    return f"{first}; {second}; {reached} for the advised rank ({advised:.2f} GB)"
