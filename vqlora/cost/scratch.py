"""Memory that an operation takes inside itself, where it is large: what `vqlora.cost.follow` cannot see.

Read off the kernels of torch 2.13 and bitsandbytes 0.50 for the CPU; their CUDA kernels take as much or less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqlora.quantize import BLOCK


def scratch_bytes(func, args: tuple, out: object) -> int:
    """Bytes beyond arguments and result that `func(*args) -> out` holds at once; 0 where that is little."""
    rule = _rules().get(func)
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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rules() -> dict:
    bnb = torch.ops.bitsandbytes
    return {
        bnb.gemm_4bit.default: _gemm_4bit,
        bnb.int8_scaled_mm.default: _int8_mm,
        bnb.int8_vectorwise_quant.default: _int8_rows,
    }
