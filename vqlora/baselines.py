"""The arms of the comparison, put on a base model: frozen, full fine-tuning, LoRA, QLoRA, ours, others.

    model = attach(prepare(base, settings), settings)    # ready to train; `prepare` chooses the bits
    trainable_report(model)["trainable_frac"]

`settings` is a `vqlora.config.RunSettings` (or anything with its fields).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vqlora.cost import parameter_count
from vqlora.modalities import target_modules
from vqlora.quantize import close_packing_trap, load_quantized

WHOLE = ("full", "posttrain")  # arms that train every weight
_OWN = {"adalora": "vqlora.rivals", "eva": "vqlora.rivals", "houlsby": "vqlora.arms.houlsby",
        "prefix": "vqlora.arms.prefix", "posttrain": "vqlora.arms.posttrain",
        "vqlora": "vqlora.arms.gated"}  # fmt: skip
ARMS = tuple(dict.fromkeys(("frozen", "full", "lora", "qlora", "vqlora", "dora", *_OWN)))
ADAPTERS = (".lora_", ".houlsby_", "prompt_encoder.")  # in the names of their parameters
Batches = Callable[[], Sequence[Mapping]]  # what an allocator reads, made when it is asked for


def prepare(model: nn.Module, settings, *, device: str | torch.device | None = None) -> nn.Module:
    """Bring a 16- or 32-bit base into the bits of `settings`, in place.

    Full fine-tuning gets float32 weights, the masters that AdamW updates: in bfloat16 a step below 1/256 of a
    weight is lost; so does "posttrain", whose bits come after training (`finish`). Every other arm is frozen
    in `settings.bits`.
    """
    if settings.arm in WHOLE:
        if getattr(model, "vqlora_precision", None) is not None:
            raise ValueError(
                f"arm {settings.arm!r}: the base is held in {model.vqlora_precision.bits!r}; load it in fp32 "
                "or bf16"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device=device, dtype=torch.float32)
    return load_quantized(model, settings.bits, compute_dtype=settings.compute_dtype, device=device)


def attach(model: nn.Module, settings, batches: Batches | None = None) -> nn.Module:
    """Make exactly the right parameters of `model` trainable for `settings.arm`; returns the model to train.

    LoRA (Hu et al. 2021, arXiv:2106.09685) goes on the full names of the layers of `settings.modalities` and
    `settings.layers`; B starts at zero, so the model starts as the base. A depends on `settings.seed` alone.
    batches: gives training batches to arms whose ranks are read off data.
    Raises ValueError for an unknown arm, an arm that does not fit the bits, or layers that match nothing.
    """
    held = getattr(getattr(model, "vqlora_precision", None), "bits", None)
    if settings.arm not in ARMS:
        raise ValueError(f"arm: {settings.arm!r} is not known; allowed: {', '.join(ARMS)}")
    if settings.arm not in ("frozen", *WHOLE) and held != settings.bits:
        raise ValueError(
            f"arm {settings.arm!r} wants a base in {settings.bits!r}, this one is in {held or 'fp32'!r}; "
            "see baselines.prepare"
        )
    if settings.arm in ("frozen", *WHOLE):
        if settings.arm in WHOLE and held is not None:
            raise ValueError(
                f"arm {settings.arm!r} cannot train a base held in {held!r}; see baselines.prepare"
            )
        return model.requires_grad_(settings.arm in WHOLE)
    own = _own_code(settings)
    if own is not None:
        config = own.configure(model, settings, batches)
    else:
        config = lora_config(model, settings)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        # Adapters stay float32 whatever the base is in: they are their own masters, and a bfloat16 one loses
        # small steps. Under float32 compute this costs nothing; under bfloat16 peft keeps a float32 copy of
        # each input.
        model = get_peft_model(model, config, autocast_adapter_dtype=True)
    if hasattr(own, "begin"):
        own.begin(model, settings, batches)
    close_packing_trap(model)
    return model


def callbacks(model: nn.Module, settings) -> list:
    """What has to be called while the Trainer trains this arm: those that move ranks."""
    own = _own_code(settings)
    return own.callbacks(model, settings) if hasattr(own, "callbacks") else []


def ranks(model: nn.Module, settings) -> dict[str, int]:
    """The rank that each layer has now, by full name, for arms that choose them; {} for others."""
    own = _own_code(settings)
    return own.ranks(model) if hasattr(own, "ranks") else {}


def finish(model: nn.Module, settings) -> tuple[nn.Module, dict[str, float]]:
    """What is saved and evaluated after training, and what it costs: of "posttrain" the model in its bits."""
    own = _own_code(settings)
    return own.finish(model, settings) if hasattr(own, "finish") else (model, {})


def _own_code(settings) -> ModuleType | None:
    """The module of an arm with code of its own (see `vqlora.arms`), or that chooses its ranks.

    Imported by name: the other arms do not depend on this code, so a change of it reruns none of them.
    """
    if settings.arm == "vqlora" and isinstance(getattr(settings, "ranks", None), str):
        return importlib.import_module("vqlora.ranks.runs")
    return importlib.import_module(_OWN[settings.arm]) if settings.arm in _OWN else None


def lora_config(model: nn.Module, settings) -> LoraConfig:
    """Stock peft LoRA on full module names, so that no other modality can be caught by a shared ending.

    Arm "dora" has it with magnitudes apart from directions (Liu et al. 2024, arXiv:2402.09353).
    """
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.arm == "dora",
        bias="none",
        target_modules=target_modules(model, settings.modalities, settings.layers),
    )


def trainable_report(model: nn.Module) -> dict[str, float]:
    """Parameters as they count, packed or not: trainable, total, base (without adapters), trainable_frac.

    trainable_frac is trainable / total; peft's own figure halves 4-bit weights in some places only.
    """
    seen: dict[int, tuple[str, nn.Parameter]] = {id(p): (name, p) for name, p in model.named_parameters()}
    total = sum(parameter_count(p) for _, p in seen.values())
    trainable = sum(parameter_count(p) for _, p in seen.values() if p.requires_grad)
    adapters = sum(parameter_count(p) for name, p in seen.values() if any(mark in name for mark in ADAPTERS))
    return {
        "trainable": trainable,
        "total": total,
        "base": total - adapters,
        "trainable_frac": trainable / total if total else 0.0,
    }
