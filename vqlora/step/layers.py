"""peft's LoRA layers, stock or gated, computed by `vqlora.step.products` while they train.

A layer's `forward` is replaced on the instance; whatever it does not know (a merged or disabled adapter,
several at once, evaluation) goes the way of the layer's own class, call by call.
"""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial

import bitsandbytes as bnb
import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import bnb as bnb_layers
from torch import Tensor, nn

from vqlora.adapter.layer import GatedUpdate
from vqlora.held import Linear16
from vqlora.step.again import recipe
from vqlora.step.products import adapted, is_frozen, low_rank

# Names of layers of one module that read the same rows. A layer that reads other rows after all (keys of a
# cross-attention) is noticed by its input and served alone.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_FORWARDS = (lora.Linear.forward, bnb_layers.Linear4bit.forward, bnb_layers.Linear8bitLt.forward)
_OWN_PRODUCT = (bnb.nn.Linear4bit, nn.Linear, Linear16)


class LeanLayers:
    """Switches `adapters` (products of this package, inputs kept as they came), `share` (one low-rank product
    of an input that several layers read) and `unpack` (W kept from a block's second forward to its backward).
    """

    def __init__(self, model: nn.Module, share: bool, unpack: bool) -> None:
        self.unpack = unpack
        self.patched: dict[nn.Module, _Shared] = {}
        blocks = {}  # layer -> the block that it lies in, which may be checkpointed
        for block in model.modules():
            if hasattr(block, "gradient_checkpointing"):
                blocks.update((module, weakref.ref(block)) for module in block.modules())
        for module in model.modules():
            free = "forward" not in vars(module)  # a head at label positions, or hooks of accelerate
            if isinstance(module, LoraLayer) and free and self.why_not_layer(module) is None:
                module.forward = partial(self._forward, module, blocks.get(module))
                self.patched[module] = _Shared([module])
        for parent in model.modules():
            for names in _TOGETHER if share else ():
                layers = [getattr(parent, name, None) for name in names]
                layers = [layer for layer in layers if layer in self.patched and not _drops(layer)]
                if len({layer.in_features for layer in layers}) == 1:
                    self.patched.update(dict.fromkeys(layers, _Shared(layers)))

    @staticmethod
    def why_not(model: nn.Module) -> Counter[str]:
        """Reasons why adapted layers are left to peft, and how many layers each holds for."""
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        return Counter(filter(None, map(LeanLayers.why_not_layer, layers)))

    @staticmethod
    def why_not_layer(layer: LoraLayer) -> str | None:
        if type(layer).forward not in _FORWARDS:
            return "no linear layer, or not plain LoRA (AdaLoRA and its like)"
        if not is_frozen(layer.get_base_layer()):
            return "the base layer learns"
        if any(not isinstance(variant, GatedUpdate) for variant in layer.lora_variant.values()):
            return "another LoRA variant (DoRA and its like)"
        if any(layer.lora_bias.values()) or getattr(layer, "fan_in_fan_out", False):
            return "a bias in B or a transposed weight"
        return None

    def off(self) -> None:
        for module in self.patched:
            del module.forward
        self.patched = {}

    def forget(self) -> None:
        """Drop what was made for layers that then read other rows."""
        for shared in self.patched.values():
            shared.forget()

    def _forward(self, layer: LoraLayer, block, x: Tensor, *args, **kwargs) -> Tensor:
        name = _one_adapter(layer)
        if name is None or args or kwargs or not x.is_floating_point():
            return type(layer).forward(layer, x, *args, **kwargs)
        base, block = layer.get_base_layer(), block() if block is not None else None
        changed = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
        own = type(base) in _OWN_PRODUCT and not changed
        keep = self.unpack and block is not None and block.gradient_checkpointing and block.training
        compute = _compute_dtype(base, x) if own else x.dtype
        if _drops(layer, name):
            cast = x.to(compute)
            with torch.autocast(x.device.type, enabled=False):
                (low,) = low_rank(layer.lora_dropout[name](cast), [layer.lora_A[name].weight])
        else:
            cast, low = self.patched[layer].of(layer, name, x, compute)
        if layer.lora_variant.get(name) is not None:
            low = low * layer.gate_of_rows(name, x.shape).to(low)
        b, scale = layer.lora_B[name].weight, layer.scaling[name]
        if own:
            with torch.autocast(x.device.type, enabled=False):
                y = adapted(cast, low, b, base.weight, base.bias, scale, keep)
            return y.to(x.dtype) if isinstance(base, bnb.nn.Linear4bit) else y
        y = base(x)
        rows = torch.addmm(y.flatten(0, -2), low.flatten(0, -2).to(y), b.to(y).T, alpha=scale)
        return rows.view(y.shape)


class _Shared:
    """What layers that read the same rows share, made when the first of them is called: the rows in the dtype
    that is multiplied in, and the low-rank products."""

    def __init__(self, layers: list[LoraLayer]) -> None:
        self.layers = layers
        self.forget()

    def forget(self) -> None:
        self.input, self.cast, self.low = None, None, {}

    def of(self, layer: LoraLayer, name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(x in `dtype`, A x) of one of the layers."""
        if self.input is None or self.input() is not x or layer not in self.low or self.cast.dtype != dtype:
            # of this layer and those behind it: one before it that read other rows has been served
            after = self.layers[self.layers.index(layer) :]
            after = [other for other in after if other is layer or _one_adapter(other) == name]
            self.input, self.cast = weakref.ref(x), x.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                parts = low_rank(self.cast, [other.lora_A[name].weight for other in after], recipe(x))
            self.low = dict(zip(after, parts, strict=True))
        cast, low = self.cast, self.low.pop(layer)
        if not self.low:
            self.forget()
        return cast, low


def _one_adapter(layer: LoraLayer) -> str | None:
    """The adapter in force, where it is one that is trained as it stands."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    return name if name in layer.lora_A and layer.training else None


def _drops(layer: LoraLayer, name: str | None = None) -> bool:
    """Whether an adapter (one of its adapters) draws a dropout of its own rows, which nobody can share."""
    drops = layer.lora_dropout.values() if name is None else [layer.lora_dropout[name]]
    return any(getattr(drop, "p", 0.0) > 0 for drop in drops)


def _compute_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer's own forward multiplies in."""
    if isinstance(base, bnb.nn.Linear4bit):
        return base.compute_dtype if base.compute_type_is_set and base.compute_dtype else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.float32 if isinstance(base, Linear16) else x.dtype
