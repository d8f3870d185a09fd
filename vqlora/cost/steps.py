"""One training step and one generation, followed: the same code for a model that is there and one planned."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vqlora.cost.follow import Follow
from vqlora.cost.inputs import prompt_only
from vqlora.cost.scratch import scratch_bytes
from vqlora.cost.shapes import Shapes


@dataclass(frozen=True)
class Followed:
    """Bytes above what was there before, by part at the peak; floating-point operations."""

    parts: dict[str, int]
    flops: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


def training_step(
    model: nn.Module, batch: Mapping[str, Tensor], *, autocast: bool = False, seen: Follow | None = None
) -> None:
    """Forward and backward as the Trainer makes them; gradients stay. autocast: products in bfloat16."""
    device = batch["input_ids"].device.type
    half = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with half:
        loss = model(**batch, use_cache=False).loss
    if seen is not None:
        seen.phase = "backward"
    loss.backward()


def follow_training(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    autocast: bool = False,
    shapes: Shapes | None = None,
    update: Callable[[], object] = lambda: None,
    device: str = "cpu",
) -> Followed:
    """Follow one training step of a model in training mode; its gradients are dropped afterwards.

    shapes: for a model made there. update: what the optimizer does behind the backward. device: whose scratch
    memory counts, as for the next two.
    """
    with _follow(model, shapes, device) as seen:
        training_step(model, batch, autocast=autocast, seen=seen)
        seen.phase = "update"
        update()
    model.zero_grad(set_to_none=True)
    return Followed(seen.peak_parts(), seen.flops.total())


@torch.no_grad()
def follow_prefill(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    answer: int,
    shapes: Shapes | None = None,
    device: str = "cpu",
) -> Followed:
    """Follow the forward that reads the prompt and its frames and fills the cache."""
    with _follow(model, shapes, device) as seen:
        cache = _prefill(model, prompt_only(batch, answer))
        seen.tag(cached(cache), "cache")
    return Followed(seen.peak_parts(), seen.flops.total())


@torch.no_grad()
def follow_last_token(
    model: nn.Module, batch: Mapping[str, Tensor], shapes: Shapes | None = None, device: str = "cpu"
) -> Followed:
    """Follow the forward that gives the last token of the answers, behind a cache of all before it."""
    before = prompt_only(batch, 2)  # one is fed now, and the last is not fed again
    with _follow(model, shapes, device) as seen:
        cache = _prefill(model, before)
        seen.tag(cached(cache), "cache")
        seen.phase = "decode"
        _token(model, before, cache)
        seen.tag(cached(cache), "cache")
    return Followed(seen.peak_parts("decode"), seen.flops["decode"])


def _follow(model: nn.Module, shapes: Shapes | None, device: str) -> Follow:
    return Follow(model, vocabulary_size(model), partial(scratch_bytes, device=device), shapes)


def _prefill(model: nn.Module, batch: Mapping[str, Tensor]) -> object:
    short = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
    return model(**batch, use_cache=True, **short).past_key_values


def _token(model: nn.Module, before: Mapping[str, Tensor], cache: object) -> None:
    rows = before["input_ids"]
    mask = torch.ones(len(rows), rows.shape[1] + 1, dtype=torch.long, device=rows.device)
    # Qwen2.5-VL reads positions off a mask, one for each of its entries; `generate` hands them in, and so
    # does this.
    place = {"position_ids": mask.sum(1, keepdim=True) - 1} if _takes(model, "position_ids") else {}
    model(input_ids=rows[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True, **place)


def _takes(model: nn.Module, name: str) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(type(inner).forward).parameters


def cached(cache: object) -> list[Tensor]:
    """All tensors of a key/value cache."""
    layers = getattr(cache, "layers", ())
    return [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]


def vocabulary_size(model: nn.Module) -> int:
    return model.config.get_text_config().vocab_size
