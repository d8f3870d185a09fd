"""The planner against measurements: the same steps on the real model, by torch's own allocator.

    table = check_planner()                      # setting, part, predicted_bytes, measured_bytes, ratio
    table.query("part == 'training peak'")

Peaks are the allocator's; on CPU it is read through the profiler. What it is made of is followed storage by
storage, as in the plan, and "unexplained" is what is in the peak but not in the parts: scratch inside
operations. The resident set stands beside it: it holds Python, torch and what the allocator keeps.
On CUDA the peak comes from its counters; that path has not run where this was written, without a card.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from vqlora.cost.build import attend, default_adapter
from vqlora.cost.inputs import prompt_only
from vqlora.cost.measure import (
    optimizer_bytes,
    reset_resident_peak,
    resident_bytes,
    resident_peak_bytes,
    step_bytes,
)
from vqlora.cost.plan import INFERENCE, TRAINING, plan_memory
from vqlora.cost.predict import Settings, make_batch, static_parts
from vqlora.cost.steps import follow_last_token, follow_prefill, follow_training, training_step
from vqlora.quantize import close_packing_trap, load_quantized

if TYPE_CHECKING:
    import pandas as pd


def check_planner(
    settings: Iterable[Mapping] | None = None, *, say: Callable[[str], None] = lambda _: None
) -> pd.DataFrame:
    """Plan and measure each of `settings` (default: `SETTINGS`), one after the other, in this process.

    settings: keyword arguments of `plan_memory` with "model", a key of `MODELS`.

    Returns:
        number, model, the settings, part, predicted_bytes, measured_bytes, ratio; the parts "training peak"
        and "generation peak" are the sums, "resident peak" (measured only) the process above what it held
        before the model was made.
    """
    import pandas as pd

    frames = []
    for number, wanted in enumerate(SETTINGS if settings is None else settings):
        wanted = dict(wanted)
        name = wanted.pop("model")
        rows = check_plan(MODELS[name], **wanted)
        shown = {key: wanted.get(key, _DEFAULTS[key]) for key in _SHOWN}
        rows.insert(0, "number", number)
        rows.insert(1, "model", name)
        for place, (key, value) in enumerate(shown.items()):
            rows.insert(2 + place, key, value)
        rows.insert(2 + len(shown), "rank", getattr(wanted.get("adapter_config"), "r", 8))
        frames.append(rows)
        peaks = rows.set_index("part").ratio
        say(f"{number}: {name} {wanted}: training {peaks['training peak']:.3f}, "
            f"generation {peaks['generation peak']:.3f}")  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def peaks(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting of `check_planner`'s table: predicted and measured peaks in MB (10^6 bytes).

    Returns:
        number, model and settings, and for training and generation predicted_mb, measured_mb, ratio; then
        resident_mb, of the process above what it held before the model was made.
    """
    keys = ["number", "model", *_SHOWN, "rank"]
    wide = table.drop_duplicates(keys)[keys].set_index("number")
    for title in ("training", "generation"):
        rows = table[table.part == f"{title} peak"].set_index("number")
        wide[f"{title}_predicted_mb"] = rows.predicted_bytes / 1e6
        wide[f"{title}_measured_mb"] = rows.measured_bytes / 1e6
        wide[f"{title}_ratio"] = rows.ratio
    resident = table[table.part == "resident peak"].set_index("number").measured_bytes
    return wide.assign(resident_mb=resident / 1e6).reset_index()


def check_plan(make: Callable[[], nn.Module], **settings) -> pd.DataFrame:
    """Plan and measure one setting: part, predicted_bytes, measured_bytes, ratio (predicted / measured)."""
    import pandas as pd

    settings = {"device": "cuda" if torch.cuda.is_available() else "cpu", **settings}
    gc.collect()
    before = resident_bytes()
    model = make()
    plan = plan_memory(model, **settings)
    found = measure(model, plan.settings)
    found["resident peak"] -= before
    rows = []
    for title, parts, foretold in (("training", TRAINING, plan.training), ("generation", INFERENCE,
                                                                           plan.inference)):  # fmt: skip
        for part in (*parts, "unexplained", "peak"):
            predicted = {"peak": sum(foretold.values()), "unexplained": 0}.get(part, foretold.get(part, 0))
            rows.append((f"{title} {part}", predicted, found[f"{title} {part}"]))
    rows.append(("resident peak", None, found["resident peak"]))
    rows.append(("step FLOPs", plan.step_flops, found["step FLOPs"]))
    rows.append(("token FLOPs", plan.token_flops, found["token FLOPs"]))
    table = pd.DataFrame(rows, columns=["part", "predicted_bytes", "measured_bytes"])
    table["ratio"] = table.predicted_bytes / table.measured_bytes.where(table.measured_bytes > 0)
    return table


def measure(model: nn.Module, settings: Settings) -> dict[str, int]:
    """Bytes of a real model under `settings`, by "training part" and "generation part"; it is changed."""
    device = torch.device(settings.device)
    model = _real(model, settings, device)
    batch = make_batch(model, settings)
    batch = {key: value.contiguous().to(device) for key, value in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(settings.optimizer, trained)
    half = settings.full and settings.dtype == "bf16"
    static = static_parts(model, batch, settings.full)
    state = optimizer_bytes(optimizer)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reset_resident_peak()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    def step() -> None:
        training_step(model, batch, autocast=half)
        update()

    peak = step_bytes(step, device)
    found = {"resident peak": resident_peak_bytes()}
    optimizer.zero_grad(set_to_none=True)
    followed = follow_training(model, batch, autocast=half, update=update, device=device.type)
    found |= _report("training", TRAINING, {**static, "optimizer": state}, followed.parts, peak)
    model.eval()
    peak = step_bytes(lambda: _generate(model, batch, settings.answer), device)
    grown = [follow_prefill(model, batch, settings.answer, device=device.type)]
    if settings.answer > 1:
        grown.append(follow_last_token(model, batch, device=device.type))
    most = max(grown, key=lambda part: part.peak_bytes)
    found |= _report("generation", INFERENCE, static, most.parts, peak)
    return {**found, "step FLOPs": followed.flops, "token FLOPs": grown[-1].flops}


def _real(model: nn.Module, settings: Settings, device: torch.device) -> nn.Module:
    if settings.full:
        return attend(model.to(device).float().requires_grad_().train(), settings)
    model = load_quantized(model, settings.bits, compute_dtype=settings.dtype, device=device,
                           double_quant=settings.double_quant, quantize_head=settings.quantize_head,
                           skip=settings.skip)  # fmt: skip
    model = get_peft_model(model, copy.deepcopy(settings.adapter or default_adapter(model)))
    close_packing_trap(model)
    return attend(model.train(), settings)


def _optimizer(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with its state, as it is from the second step on."""
    kinds = {"adamw_torch": torch.optim.AdamW, "sgd": torch.optim.SGD}
    if name not in kinds:
        raise ValueError(f"optimizer: {name!r} cannot be measured here; allowed: {', '.join(kinds)}")
    optimizer = kinds[name](trained, lr=1e-6)
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@torch.no_grad()
def _generate(model: nn.Module, batch: Mapping[str, Tensor], answer: int) -> None:
    exactly = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
    model.generate(**prompt_only(batch, answer), **exactly)


def _report(title: str, names, static: Mapping[str, int], moving: Mapping[str, int], peak: int) -> dict:
    parts = {name: static.get(name, 0) + moving.get(name, 0) for name in names}
    total = sum(static.values()) + peak
    parts |= {"unexplained": total - sum(parts.values()), "peak": total}
    return {f"{title} {name}": size for name, size in parts.items()}


def _kinevlm() -> nn.Module:
    from vqlora.base import load_base

    return load_base("released")[0]


def smolvlm(image_size: int = 96) -> nn.Module:
    """SmolLM2-135M's decoder (Allal et al. 2025, arXiv:2502.02737) behind a tower of 3M parameters; random
    weights. Frames of `image_size` pixels a side, (image_size / 48) ** 2 tokens each."""
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280,
            "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
              "image_size": image_size, "patch_size": 16}  # fmt: skip
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3, tie_word_embeddings=True,
                           image_token_id=49152)  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


MODELS: Mapping[str, Callable[[], nn.Module]] = {"KineVLM": _kinevlm, "SmolVLM-135M": smolvlm}
_SHOWN = ("bits", "full", "frames", "prompt", "answer", "batch", "gradient_checkpointing", "dtype",
          "optimizer")  # fmt: skip
_DEFAULTS = {key: plan_memory.__kwdefaults__[key] for key in _SHOWN}


def _adapter(rank: int, gate: str = "none", modalities=("vision", "fusion", "text")):
    from vqlora.adapter import VQLoraConfig

    return VQLoraConfig(r=rank, gate=gate, modalities=modalities)


def _settings() -> tuple[dict, ...]:
    """Bits, ranks, frames, batch, checkpointing, dtype, gates and optimizers, varied one or two at a time."""
    small = {"model": "KineVLM", "batch": 4, "frames": 8, "prompt": 8, "answer": 16}
    large = {"model": "SmolVLM-135M", "batch": 1, "frames": 2, "prompt": 8, "answer": 8}
    return (
        small,
        {**small, "bits": "bf16"},
        {**small, "bits": "int8", "dtype": "fp32"},
        {**small, "bits": "fp4", "dtype": "fp32"},
        {**small, "dtype": "fp32", "batch": 16},
        {**small, "gradient_checkpointing": True},
        {**small, "frames": 16, "adapter_config": _adapter(2)},
        {**small, "frames": 4, "batch": 8, "adapter_config": _adapter(32, "rank")},
        {**small, "adapter_config": _adapter(8, "scalar", ("text",)), "dtype": "fp32"},
        {**small, "batch": 1, "answer": 64},
        {**small, "full": True, "dtype": "fp32"},
        {**small, "full": True, "optimizer": "sgd"},
        large,
        {**large, "bits": "bf16"},
        {**large, "bits": "int8", "dtype": "fp32"},
        {**large, "dtype": "fp32", "adapter_config": _adapter(16)},
        {**large, "batch": 2, "frames": 4, "gradient_checkpointing": True},
        {**large, "frames": 6, "adapter_config": _adapter(2, "none", ("text",))},
        {**large, "batch": 2, "double_quant": False},
        {**large, "full": True, "dtype": "fp32"},
    )


SETTINGS = _settings()
