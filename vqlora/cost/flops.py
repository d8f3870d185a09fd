"""Floating-point operations, right for 4-bit and 8-bit layers and for attention on CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of one call, a multiply-add as two; 4-bit and 8-bit layers count as 16-bit
    ones do.
    """
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        step()
    return counter.get_total_flops()


def flop_formulas() -> Mapping[object, Callable[..., int]]:
    """Operator -> formula(*arguments, out_val=result) of all operators that `count_flops` counts."""
    return FlopCounterMode(display=False, custom_mapping=_formulas()).flop_registry


def _formulas() -> dict:
    """Operators that torch counts as zero. Shapes come in, not tensors (except where `_get_raw` says so)."""

    def gemm(a, packed, shape, *args, out_shape=None, **kwargs):  # [.., K] x [N, K]
        return 2 * math.prod(a) * shape[0]

    def int8(a, b, *args, out_shape=None, **kwargs):
        return 2 * math.prod(a) * b[0]

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop(query, key, value)

    def attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop(grad, query, key, value)

    aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
    table = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    for name, formula in (("gemm_4bit", gemm), ("int8_scaled_mm", int8), ("int8_linear_matmul", int8)):
        if hasattr(bnb, name):
            table[getattr(bnb, name)] = formula
    return table
