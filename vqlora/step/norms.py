"""Root-mean-square norms with a backward that is written out (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = w · a     a = x r     r = 1 / sqrt(mean(x²) + ε)     ∂x = r (d - a mean(d · a))     d = w · ∂y

Kept are x and r, one number a row. In float32 whatever x is in, as transformers' own norms compute it. A
recorded graph of the same formula walks a dozen times over arrays in float32; here some rows at a time go
through all of it, so that on a CPU they stay in the cache.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch import Tensor, nn

ROWS = 1 << 18  # numbers of x that are widened at a time
_FORMULA = [
    "input_dtype = hidden_states.dtype",
    "hidden_states = hidden_states.to(torch.float32)",
    "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
    "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
    "return self.weight * hidden_states.to(input_dtype)",
]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, r, weight)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, r, weight = ctx.saved_tensors
        width = x.shape[-1]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        count = max(1, ROWS // width) if x.device.type == "cpu" else x.numel() // width
        parts = (t.reshape(-1, t.shape[-1]).split(count) for t in (x, r, grad, out))
        for some, scale, above, found in zip(*parts, strict=True):
            a = some.to(torch.float32) * scale
            d = (above * weight).to(some.dtype).to(torch.float32)
            found.copy_(d.addcmul_(a, (d * a).mean(-1, keepdim=True), value=-1).mul_(scale))
        return out, None, None


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """What the module (one that `is_rms_norm` knows, frozen) makes of x [.., D], bit for bit."""
    return _RMSNorm.apply(x, module.weight.detach(), module.variance_epsilon)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module's forward is Llama's formula, by its source."""
    if not (hasattr(module, "variance_epsilon") and hasattr(module, "weight")):
        return False
    return _is_formula(type(module))


@cache
def _is_formula(kind: type[nn.Module]) -> bool:
    try:
        body = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return [line.strip() for line in body.splitlines()[1:] if line.strip()] == _FORMULA
