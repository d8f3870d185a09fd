"""Layers whose weights are stored in bfloat16 and widened to float32 where they are used.

For machines that multiply float32 faster than bfloat16 (no AVX512-BF16): storage and checkpoints stay at 16
bits, arithmetic is float32, and the widened copy lives only as long as one layer's call.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class _Matmul16(torch.autograd.Function):
    """y = x Wᵀ + b for a frozen bfloat16 W, widened again in backward: no float32 copy of it is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class Linear16(nn.Linear):
    """x [..., d_in] float32 (or anything, widened) -> [..., d_out] float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return F.linear(x.float(), self.weight.float(), bias)
        return _Matmul16.apply(x.float(), self.weight, bias)


class Embedding16(nn.Embedding):
    """ids [...] -> [..., d] float32."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).float()


class LayerNorm16(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, _wide(self.weight), _wide(self.bias), self.eps)


class Conv2d16(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x.float(), self.weight.float(), _wide(self.bias))


class Conv3d16(nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x.float(), self.weight.float(), _wide(self.bias))


HELD = {
    nn.Linear: Linear16,
    nn.Embedding: Embedding16,
    nn.LayerNorm: LayerNorm16,
    nn.Conv2d: Conv2d16,
    nn.Conv3d: Conv3d16,
}


class _ComputesInFloat32:
    """Mixed into a held PreTrainedModel: models cast activations to `self.dtype`, so it says what flows."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


@cache
def _float32_version(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(
        cls.__name__, (_ComputesInFloat32, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def plain_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class a held model was made from; any other class itself."""
    return next(c for c in cls.__mro__ if not issubclass(c, _ComputesInFloat32))


def hold_in_16bit(model: nn.Module) -> nn.Module:
    """Make a model whose unquantized parameters are bfloat16 compute in float32, in place.

    Modules of the exact types above keep bfloat16 storage. Parameters of any other module (own norms,
    position tables, `MultiheadAttention`) are few and become float32 with their bfloat16 values, and are
    counted so.
    """
    held = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, _ComputesInFloat32):
            module.__class__ = _float32_version(type(module))
        if type(module) in HELD:
            module.__class__ = HELD[type(module)]
        if type(module) in HELD.values():
            held.update(id(p) for p in module.parameters(recurse=False))
    for param in model.parameters():
        if param.dtype == torch.bfloat16 and id(param) not in held:
            param.data = param.data.float()
    return model


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
