"""The two products of an adapted layer, y = W x + b + s · B (g ⊙ (A x)), with little kept for backward.

Written out, peft's layer keeps a float32 copy of x for each of its adapters, unpacks W [d_out, d_in] in
forward and again in backward, and walks five times over arrays as wide as y. Here x is kept once, as it
came, by `low_rank`, the update is added in place, and W is handed from forward to backward where asked.

Glossary: N rows (tokens), r rank, `low` = A x [N, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqlora.step.again import recipe


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, made, *a: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.cat(a) if len(a) > 1 else a[0]
        ctx.function, inputs = made
        ctx.count, ctx.dtype = len(inputs), x.dtype
        ctx.save_for_backward(*inputs, *a)
        low = F.linear(x.to(stacked.dtype), stacked)
        return tuple(part.contiguous() for part in low.split([len(one) for one in a], dim=-1))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        saved = ctx.saved_tensors
        inputs, a = saved[: ctx.count], saved[ctx.count :]
        x = ctx.function(*inputs).to(ctx.dtype)
        stacked = torch.cat(a) if len(a) > 1 else a[0]
        grad = torch.cat([g.reshape(-1, g.shape[-1]) for g in grads], dim=-1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ stacked).to(x.dtype).view(x.shape)
        of_all = grad.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        return grad_x, None, *of_all.split([len(one) for one in a])


def low_rank(x: Tensor, a: Sequence[Tensor], made=None) -> tuple[Tensor, ...]:
    """A x [.., r] for each A [r, d_in] of the adapters that read the same x [.., d_in], in one product.

    In the dtype of A; x is widened to it for the moment of the product, not kept so. made: how x can be made
    again (`vqlora.step.again.recipe`): then what it is made of is kept in its place.
    """
    return _LowRank.apply(x, recipe(x) if made is None else made, *a)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, b, weight, bias, scale: float, keep: bool) -> Tensor:
        kept = unpack(weight, x.dtype) if keep and ctx.needs_input_grad[0] else None
        y = frozen_product(x, weight, bias, kept)
        if low is not None:
            rows = y.view(-1, y.shape[-1])
            rows.addmm_(low.to(y.dtype).reshape(-1, low.shape[-1]), b.to(y.dtype).T, alpha=scale)
        ctx.save_for_backward(low, b, kept)
        ctx.weight, ctx.scale = weight, scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        low, b, kept = ctx.saved_tensors
        rows, scale = grad.reshape(-1, grad.shape[-1]), ctx.scale
        grad_x = grad_low = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (unpack(ctx.weight, grad.dtype) if kept is None else kept)
        if ctx.needs_input_grad[1]:
            grad_low = (rows @ b.to(grad.dtype)).to(low.dtype).mul_(scale).view(low.shape)
        if ctx.needs_input_grad[2]:
            # short rows times long ones: several times faster than the other way round
            grad_b = (low.to(grad.dtype).reshape(len(rows), -1).T @ rows).T.to(b.dtype) * scale
        return grad_x, grad_low, grad_b, None, None, None, None


def adapted(
    x: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: bool = False,
) -> Tensor:
    """W x + bias + scale · B low, for a frozen W (packed in 4 bits, or as it is) and x [.., d_in].

    low: [.., r], gated already; None for a layer without an adapter. keep: hand W from forward to backward;
    inside a checkpointed block that is from its second forward only, so one block's weights are there at a
    time.
    """
    return _Adapted.apply(x, low, b, weight, bias, scale, keep)


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None, unpacked: Tensor | None = None) -> Tensor:
    """W x + bias without a graph; bitsandbytes' own kernel where the weight is packed still."""
    bias = None if bias is None else bias.to(x.dtype)
    if unpacked is None and isinstance(weight, bnb.nn.Params4bit):
        return bnb.matmul_4bit(x, weight, bias=bias, quant_state=weight.quant_state)
    return F.linear(x, unpack(weight, x.dtype) if unpacked is None else unpacked, bias)


def unpack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W [d_out, d_in] in `dtype`; the weight itself where it is that already."""
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.detach().to(dtype)


def is_frozen(layer: nn.Module) -> bool:
    """Whether neither weight nor bias of the layer learns."""
    return not any(p.requires_grad for p in layer.parameters(recurse=False))
