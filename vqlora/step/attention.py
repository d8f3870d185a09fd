"""Attention for training on a CPU that keeps q, k and v only, each key head once however many share it.

Registered with transformers as an attention implementation like any other. In float32 torch's fused kernel
does the work. In bfloat16 that one is slow, and the written-out one keeps [B, H, L, S] for every layer: here
probabilities are made again in backward, queries go in blocks, and a block looks at no key behind the last
one that its mask allows, half of a causal layer's work. Short rows go together, as many as fit the cache with
their scores. Evaluation and attention dropout go to torch's own.

    out = softmax(scale · q kᵀ + mask) v       kept: q, k, v       (Rabe and Staats 2021, arXiv:2112.05682)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vqlora_lean"
BLOCK = 128  # queries, where keys are barred
ROOM = 1 << 20  # scores that are made at a time, where one block of one row has no more
_FUSED = (torch.float32, torch.float64)


class _Recomputed(torch.autograd.Function):
    """q [B, K, G, L, D]; k, v [B, K, S, D]: G query heads share a key head; mask [B|1, 1, L, S]."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale
        out = torch.empty_like(q)
        for rows, block, seen, barred in _blocks(q, k, mask, causal):
            some = q[rows, :, :, block]
            p = _probabilities(some, k[rows, :, :seen], barred, scale)
            out[rows, :, :, block] = torch.bmm(p, _stack(v[rows, :, :seen])).view(some.shape)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for rows, block, seen, barred in _blocks(q, k, mask, ctx.causal):
            some, keys, values = q[rows, :, :, block], k[rows, :, :seen], _stack(v[rows, :, :seen])
            p = _probabilities(some, keys, barred, ctx.scale)
            g = grad[rows, :, :, block].reshape(len(p), -1, grad.shape[-1])
            grad_v[rows, :, :seen].view(values.shape).baddbmm_(p.mT, g)
            ds = torch.ops.aten._softmax_backward_data(g @ values.mT, p, -1, p.dtype)
            grad_q[rows, :, :, block] = _scaled(ds, _stack(keys), ctx.scale).view(some.shape)
            grad_k[rows, :, :seen].view(values.shape).baddbmm_(ds.mT, some.reshape(g.shape), alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


class _Fused(torch.autograd.Function):
    """torch's fused kernel for the CPU, with keys and values kept once for the G heads that share them."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal: bool, scale: float) -> Tensor:
        if mask is not None:  # the least number and not -inf: a row that sees nothing stays a number
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
        wide = q.flatten(1, 2), *_widen(q, k, v)
        out, sums = _flash(*wide, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, mask, out, sums = ctx.saved_tensors
        wide = q.flatten(1, 2), *_widen(q, k, v)
        grads = _flash_backward(grad, *wide, out, sums, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        of_q, of_k, of_v = (g.view(len(q), q.shape[1], q.shape[2], -1, q.shape[-1]) for g in grads)
        return of_q, of_k.sum(dim=2), of_v.sum(dim=2), None, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, K·G, S, D] for each query head."""
    shape = (*q.shape[:3], *k.shape[2:])
    return tuple(x[:, :, None].expand(shape).reshape(shape[0], -1, *shape[3:]) for x in (k, v))


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool):
    """(rows, block of queries, number of keys it may look at, which of the last n of these it may not
    [rows|1, l, n]), the first two as slices.

    n counts from the first one that any query of the block may not look at; None where there is none.
    """
    length, keys, heads = q.shape[3], k.shape[2], q.shape[1] * q.shape[2]
    size = BLOCK if causal or mask is not None else max(BLOCK, ROOM // (heads * keys))
    many = max(1, ROOM // (heads * min(size, length) * keys))
    later = torch.ones(1, BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1) if causal else None
    for row in range(0, len(q), many):
        rows = slice(row, min(row + many, len(q)))
        for start in range(0, length, size):
            block, seen, barred = slice(start, min(start + size, length)), keys, None
            if causal:
                seen, count = block.stop, block.stop - start
                barred = later[:, :count, :count]
            elif mask is not None:
                barred = ~mask[rows if len(mask) > 1 else slice(None), 0, block]
                allowed = (~barred).flatten(0, 1).any(dim=0).nonzero()
                seen = int(allowed[-1]) + 1 if len(allowed) else keys
                some = barred[..., :seen].flatten(0, 1).any(dim=0).nonzero()
                barred = barred[..., int(some[0]) : seen] if len(some) else None
            yield rows, block, seen, barred


def _probabilities(q: Tensor, k: Tensor, barred: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) [R·K, G·l, s] of one block of R rows, without the keys that are barred."""
    rows, heads, group, length = q.shape[:4]
    scores = _scaled(q.reshape(rows * heads, group * length, -1), _stack(k).mT, scale)
    if barred is not None:
        last = scores.view(rows, heads, group, length, -1)[..., scores.shape[-1] - barred.shape[-1] :]
        last.masked_fill_(barred[:, None, None], torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1)


def _stack(x: Tensor) -> Tensor:
    """[R, K, s, D] as a stack of matrices [R·K, s, D]; a copy where memory has them in no such order."""
    return x.reshape(-1, *x.shape[2:])


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b for stacks of matrices, without another pass over the result."""
    return torch.baddbmm(a.new_empty(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=scale)


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [B, H, L, D], key and value [B, K, S, D] with K dividing H -> [B, L, H, D]; as transformers calls
    its attention functions. attention_mask: None, or True where a query may look, [B|1, 1, L, S].
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    known = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    odd = kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    same = len(query) == len(key) and key.shape == value.shape and query.shape[-1] == key.shape[-1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if not (learns and known and same) or odd or dropout or (causal and query.shape[2] != key.shape[2]):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], length, width)
    scale = width**-0.5 if scaling is None else scaling
    kernel = _Fused if query.dtype in _FUSED and query.device.type == "cpu" else _Recomputed
    out = kernel.apply(grouped, key, value, attention_mask, causal, scale)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make transformers know the function and the kind of mask that it wants."""
    AttentionInterface.register(NAME, lean_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
