"""What makes a step lean: switches that are on where they are exact, with the reason where they are off."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from vqlora.quantize import close_packing_trap
from vqlora.step import attention as lean_attention
from vqlora.step.again import Recomputed
from vqlora.step.head import CHUNK, LabelHead
from vqlora.step.layers import LeanLayers
from vqlora.step.towers import FrozenTowers, InputGradients, frozen_parts

_ON_MODEL = "_vqlora_lean_step"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Switch:
    """Whether a saving is in force, and why or why not."""

    on: bool
    reason: str


class LeanStep:
    """What `lean_step` did to a model: `switches` by name; `off()` (or leaving a `with`) undoes it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.switches, self._undo = model, {}, []
        setattr(model, _ON_MODEL, self)

    def __enter__(self) -> LeanStep:
        return self

    def __exit__(self, *fault) -> None:
        self.off()

    def __str__(self) -> str:
        rows = self.switches.items()
        return "\n".join(f"{name:9} {'on ' if s.on else 'off'} {s.reason}" for name, s in rows)

    def off(self) -> None:
        """Leave the model as it was; a second call does nothing."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        vars(self.model).pop(_ON_MODEL, None)

    def _set(self, name: str, asked: bool, why_not: str | None, why: str) -> bool:
        on = asked and why_not is None
        self.switches[name] = Switch(on, why if on else why_not if asked else "asked for")
        _log.info("lean step: %s %s: %s", name, "on" if on else "off", self.switches[name].reason)
        return on


def lean_step(
    model: nn.Module,
    *,
    labels: bool = True,
    chunk: int = CHUNK,
    adapters: bool = True,
    share: bool = True,
    unpack: bool = True,
    again: bool = True,
    frozen: bool = True,
    below: bool = True,
    cache: bool = True,
    attention: str = "auto",
    features: str | Path | None = None,
) -> LeanStep:
    """Make training steps of `model` (wrapped by peft or not) cheaper at the same mathematics.

    Only training is touched: in eval mode every output is what it was (attention is torch's own there). A
    switch that is not exact for this model stays off, and says why (`print(lean)`, and once in the log).
    Meanwhile `output_attentions` gives none, and the model is neither compiled nor merged.

    labels: head and loss at label positions alone; `outputs.logits` is None then. Over large vocabularies in
        chunks of `chunk` logits (0: no chunks).
    adapters: low-rank updates without float32 copies of their inputs, W unpacked by need.
    share: layers that read the same rows (q, k, v) share one low-rank product.
    unpack: in checkpointed blocks, a 4-bit weight is unpacked twice and not three times.
    again: outputs of norms, activations and gated units are made again in backward and not kept.
    frozen: towers without adapters keep no graph.
    below: nor do layers below the first adapter, where checkpointing would make them.
    cache: no key/value cache while training.
    attention: "lean" is the faster one for the dtype on a CPU, keeping no scores and keys once
        (`vqlora.step.attention`); "eager" or "sdpa" as in transformers; "auto" is lean on a CPU and leaves
        CUDA to its fused kernels; "keep" changes nothing.
    features: folder that keeps features of frozen towers by content, from epoch to epoch.

    Raises ValueError for an unknown attention, and where the model's step is lean already.

    >>> lean = lean_step(model)                               # doctest: +SKIP
    >>> Trainer(model, arguments, train_dataset=data).train() # doctest: +SKIP
    >>> lean.off()                                            # doctest: +SKIP
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _ON_MODEL in vars(base):
        raise ValueError(f"{type(base).__name__}: its step is lean already; call .off() on what made it so")
    if attention not in ("auto", "keep", "eager", "sdpa", "lean"):
        raise ValueError(f"attention: {attention!r}; allowed: auto, keep, eager, sdpa, lean")
    close_packing_trap(base)
    lean = LeanStep(base)
    try:
        _switch_head(lean, base, labels, chunk)
        _switch_layers(lean, base, adapters, share, unpack)
        _switch_units(lean, base, again)
        _switch_graph(lean, base, frozen, below, features)
        _switch_cache(lean, base, cache)
        _switch_attention(lean, base, attention)
    except Exception:
        lean.off()
        raise
    return lean


def _switch_head(lean: LeanStep, base: nn.Module, labels: bool, chunk: int) -> None:
    if lean._set("labels", labels, LabelHead.why_not(base), "head and loss at label positions"):
        head = LabelHead(base, chunk)
        lean._undo.append(head.off)
        why_not = "asked for" if not chunk else "the model has a loss of its own"
        lean._set("chunks", True, None if head.chunked else why_not, f"at most {chunk:,} logits at once")


def _switch_layers(lean: LeanStep, base: nn.Module, adapters: bool, share: bool, unpack: bool) -> None:
    left = LeanLayers.why_not(base)
    layers = LeanLayers(base, share, unpack) if adapters else None
    if layers is not None:
        lean._undo.append(layers.off)
    count = len(layers.patched) if layers is not None else 0
    others = "".join(f"; {number} left to peft: {reason}" for reason, number in left.items())
    none = others.removeprefix("; ") or "no layer has a LoRA adapter"
    lean._set("adapters", adapters, None if count else none, f"{count} layers keep their input once{others}")
    if not count:
        return
    together = sum(len(group.layers) for group in set(layers.patched.values()) if len(group.layers) > 1)
    lean._set("share", share, None if together else "no layers read the same rows",
              f"{together} layers share low-rank products")  # fmt: skip
    lean._set("unpack", unpack, None, "weights go from a checkpointed block's recomputation to its backward")
    hook = base.register_forward_pre_hook(lambda *_: layers.forget())
    lean._undo.append(hook.remove)


def _switch_units(lean: LeanStep, base: nn.Module, again: bool) -> None:
    units = Recomputed(base) if again else None
    count = len(units.patched) if again else 0
    why_not = None if count else "no frozen norms or activations"
    if lean._set("again", again, why_not, f"{count} norms, activations and gated units"):
        lean._undo.append(units.off)


def _switch_graph(lean: LeanStep, base: nn.Module, frozen: bool, below: bool, features) -> None:
    parts = frozen_parts(base)
    why_not = None if parts else "every tower learns, or the architecture is not described"
    if lean._set("frozen", frozen, why_not, f"no graph in {', '.join(parts)}"):
        towers = FrozenTowers(base, features)
        lean._undo.append(towers.off)
        lean.caches = towers.caches
        if features is not None:
            lean._set("features", True, None if towers.caches else "no frozen tower sees frames one by one",
                      f"{', '.join(towers.caches)} kept in {features}")  # fmt: skip
    why_not = None if isinstance(base, PreTrainedModel) else "not a transformers model"
    if lean._set("below", below, why_not, "no gradients of embeddings, unless a checkpoint is reentrant"):
        lean._undo.append(InputGradients(base).off)


def _switch_cache(lean: LeanStep, base: nn.Module, cache: bool) -> None:
    takes = "use_cache" in inspect.signature(type(base).forward).parameters
    if lean._set("cache", cache, None if takes else "forward takes no use_cache", "no keys and values kept"):

        def without(module, args, kwargs):
            if module.training and kwargs.get("past_key_values") is None:
                return args, {"use_cache": False, **kwargs}
            return None

        lean._undo.append(base.register_forward_pre_hook(without, with_kwargs=True).remove)


def _switch_attention(lean: LeanStep, base: nn.Module, asked: str) -> None:
    cuda = any(p.device.type == "cuda" for p in base.parameters())
    chosen = {"auto": "keep" if cuda else "lean"}.get(asked, asked)
    models = [m for m in base.modules() if isinstance(m, PreTrainedModel)]
    models = [m for m in models if m._can_set_attn_implementation()]
    why_not = None if models else "its attention is its own"
    if chosen == "keep":
        why_not = "fused kernels are fast on CUDA" if asked == "auto" else "asked for"
    if not lean._set("attention", True, why_not, chosen):
        return
    lean_attention.register()
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in models}

    def attend(names: dict[int, str]) -> None:
        # not by `set_attn_implementation`, which also sets configurations that no model here answers for
        for key, (config, _) in before.items():
            config._attn_implementation_internal = names[key]

    attend(dict.fromkeys(before, lean_attention.NAME if chosen == "lean" else chosen))
    lean._undo.append(lambda: attend({key: name for key, (_, name) in before.items()}))
