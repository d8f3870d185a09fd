"""Tiny models with adapters that do something, for tests."""

import peft
import torch

import vqlora
from vqlora.zoo import tiny_batch, tiny_model


def adapted(name="kinevlm", seed=1, **settings):
    model = tiny_model(name)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, vqlora.VQLoraConfig(**{"ranks": 4, **settings}))


def stir(model, only="", seed=3):
    """Give B and the gates values as after training."""
    for name, p in model.named_parameters():
        if (".lora_B." in name or ".lora_gate" in name) and only in name:
            rng = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            p.data = (torch.randn(p.shape, generator=rng) * 0.3).to(p)
    return model


def batch(name="kinevlm", **more):
    return tiny_batch(name, tiny_model(name), **more)


def without_labels(inputs):
    return {key: value for key, value in inputs.items() if key != "labels"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def table(model, **inputs):
    model(**inputs)
    return next(iter(vqlora.gates(model).values()))
