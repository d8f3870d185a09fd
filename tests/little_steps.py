"""Tiny models under plain peft LoRA, and their training steps, for tests of the lean one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vqlora.modalities import describe, target_modules
from vqlora.quantize import load_quantized
from vqlora.zoo import tiny_model


def plain_model(name, bits="nf4", compute="fp32", parts=None, **lora):
    """A tiny class under stock peft LoRA with something in B, in training mode."""
    base = tiny_model(name)
    parts = parts or [m for m in ("vision", "fusion", "text") if getattr(describe(base), m)]
    targets = target_modules(base, parts)
    base = load_quantized(base, bits, compute_dtype=compute, device="cpu")
    base.is_loaded_in_4bit = bits == "nf4"
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": targets, **lora}))
    for key, param in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(param, std=0.1)
    return without_dropout(model.train())


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def step(model, batch, **more):
    """(loss, gradients) of one training step; none are left."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, **more)
    output["loss"].backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return output["loss"].item(), grads, output


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def assert_same(one, other, tolerance):
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert other[1].keys() == one[1].keys()
    noise = 1e-4 * max(grad.norm() for grad in one[1].values())  # some gradients are zero but for rounding
    for key, grad in one[1].items():
        error = (other[1][key] - grad).norm() / grad.norm().clamp_min(noise)
        assert error < tolerance, f"{key}: {error:.1e}"
