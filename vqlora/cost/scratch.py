"""Memory that an operation takes inside itself, where it is large: what `vqlora.cost.follow` cannot see.

Read off the kernels of torch 2.13 and bitsandbytes 0.50 for the CPU; their CUDA kernels take as much or less.
What is copied for oneDNN alone is not counted for CUDA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqlora.quantize import BLOCK


def scratch_bytes(func, args: tuple, out: object, device: str = "cpu") -> int:
    """Bytes beyond arguments and result that `func(*args) -> out` holds at once; 0 where that is little."""
    rule = _rules().get(func) if device == "cpu" or func is not torch.ops.aten.bmm.default else None
    return max(0, rule(args, out)) if rule is not None else 0


def _gemm_4bit(args, out) -> int:
    """x [.., K], packed, [N, K]: the whole weight in the dtype of x, and its scales in float32."""
    count = math.prod(args[2])
    return count * args[0].element_size() + 4 * count // BLOCK


def _int8_mm(args, out) -> int:
    """Three [M, N] in 32 bits at once (sums, scales, their product) before the result is there."""
    return 12 * out.numel() - _bytes(out)


def _int8_rows(args, out) -> int:
    """Rows [M, K] scaled and rounded, each time in float32, before they are int8."""
    return 8 * args[0].numel() - args[0].numel()


def _bmm(args, out) -> int:
    """Operands [B, m, n] in bfloat16 that oneDNN cannot take as they lie and copies: a head's weight that is
    broadcast over the rows of a batch, say, whenever the last token alone is asked for."""
    half = (tensor for tensor in args[:2] if tensor.dtype == torch.bfloat16)
    return sum(_bytes(tensor) for tensor in half if not _lies_plainly(tensor))


def _lies_plainly(tensor: Tensor) -> bool:
    _, rows, columns = tensor.shape
    return tensor.is_contiguous() or tensor.stride() == (rows * columns, 1, rows)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rules() -> dict:
    bnb = torch.ops.bitsandbytes
    return {
        torch.ops.aten.bmm.default: _bmm,
        bnb.gemm_4bit.default: _gemm_4bit,
        bnb.int8_scaled_mm.default: _int8_mm,
        bnb.int8_vectorwise_quant.default: _int8_rows,
    }
