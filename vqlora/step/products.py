"""The two products of an adapted layer, y = W x + b + s · B (g ⊙ (A x)), with little kept for backward.

Written out, peft's layer keeps a float32 copy of x for each of its adapters, unpacks W [d_out, d_in] in
forward and again in backward, and walks five times over arrays as wide as y. Here x is kept once, as it
came, by `low_rank`, the update is added in place, and W is handed from forward to backward where asked.

Adapters are in float32 where the model computes in 16 bits, so that x is widened for A x. A whole copy would
be as large as x twice over, and memory that is new to the process is slower than the product: on a CPU a few
rows at a time are widened, into one buffer that stays in the cache.

Glossary: N rows (tokens), r rank, `low` = A x [N, r].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqlora.step.again import recipe

WIDENED = 1 << 18  # numbers of x that are widened at a time on a CPU


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, made, *a: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.cat(a) if len(a) > 1 else a[0]
        ctx.function, inputs = made
        ctx.count, ctx.dtype = len(inputs), x.dtype
        ctx.save_for_backward(*inputs, *a)
        low = _project(x, stacked)
        return tuple(part.contiguous() for part in low.split([len(one) for one in a], dim=-1))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        saved = ctx.saved_tensors
        inputs, a = saved[: ctx.count], saved[ctx.count :]
        x = ctx.function(*inputs).to(ctx.dtype)
        stacked = torch.cat(a) if len(a) > 1 else a[0]
        grad = torch.cat([g.reshape(-1, g.shape[-1]) for g in grads], dim=-1)
        grad_x, of_all = _project_back(grad, x, stacked, ctx.needs_input_grad[0])
        return grad_x, None, *of_all.split([len(one) for one in a])


def _project(x: Tensor, a: Tensor) -> Tensor:
    """A x [.., r] in the dtype of A [r, d_in]."""
    if x.dtype == a.dtype or x.device.type != "cpu":
        return F.linear(x.to(a.dtype), a)
    rows = x.reshape(-1, x.shape[-1])
    low = a.new_empty(len(rows), len(a))
    for some, wide in _some_rows(rows, a):
        torch.mm(wide.copy_(rows[some]), a.T, out=low[some])
    return low.view(*x.shape[:-1], len(a))


def _project_back(grad: Tensor, x: Tensor, a: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of x (if it is wanted, in its dtype) and of A, from that of A x [N, r]."""
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == a.dtype or x.device.type != "cpu":
        return (grad @ a).to(x.dtype).view(x.shape) if wanted else None, grad.T @ rows.to(grad.dtype)
    grad_x, grad_a = torch.empty_like(rows) if wanted else None, torch.zeros_like(a)
    for some, wide in _some_rows(rows, a):
        grad_a.addmm_(grad[some].T, wide.copy_(rows[some]))
        if wanted:
            grad_x[some] = torch.mm(grad[some], a, out=wide)
    return grad_x.view(x.shape) if wanted else None, grad_a


def _some_rows(rows: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows [N, d_in] in turn, each with the same room for that many in another dtype."""
    count = max(1, WIDENED // rows.shape[-1])
    room = like.new_empty(min(count, len(rows)), rows.shape[-1])
    for start in range(0, len(rows), count):
        some = slice(start, min(start + count, len(rows)))
        yield some, room[: some.stop - start]


def low_rank(x: Tensor, a: Sequence[Tensor], made=None) -> tuple[Tensor, ...]:
    """A x [.., r] for each A [r, d_in] of the adapters that read the same x [.., d_in], in one product.

    In the dtype of A; x is widened to it for the product, not kept so. made: how x can be made
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
