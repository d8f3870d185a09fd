"""What an optimizer keeps and needs, by the Trainer's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

_SMALL = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bits
_BLOCK_8BIT = 256  # one float32 scale per 256 values of 8-bit state


def optimizer_plan(name: str, sizes: Iterable[torch.Size], device: str = "cuda") -> tuple[int, int]:
    """(bytes of state, bytes needed during the step) over float32 parameters of the given sizes.

    `adamw_torch` works through all tensors at once on CUDA (`foreach`), one by one on the CPU; fused and
    bitsandbytes' kernels need nothing beyond their state. Paged state is counted in full, though it can leave
    the card. Raises ValueError for an optimizer that is not in the table.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: {name!r} is not known here; allowed: {', '.join(OPTIMIZERS)}")
    sizes = [tuple(size) for size in sizes]
    state = sum(OPTIMIZERS[name](size) for size in sizes)
    if name not in ("adamw_torch", "adafactor"):
        return state, 0
    counts = [math.prod(size) for size in sizes] or [0]
    return state, 4 * sum(counts) if device == "cuda" else 8 * max(counts)


def _adam(size: tuple[int, ...]) -> int:
    return 8 * math.prod(size)


def _adam_torch(size: tuple[int, ...]) -> int:
    return 8 * math.prod(size) + 4  # each tensor has its own step counter


def _adam_8bit(size: tuple[int, ...]) -> int:
    count = math.prod(size)
    return 8 * count if count < _SMALL else 2 * count + 8 * math.ceil(count / _BLOCK_8BIT)


def _lion(size: tuple[int, ...]) -> int:
    return 4 * math.prod(size)


def _lion_8bit(size: tuple[int, ...]) -> int:
    count = math.prod(size)
    return 4 * count if count < _SMALL else count + 4 * math.ceil(count / _BLOCK_8BIT)


def _adafactor(size: tuple[int, ...]) -> int:
    """Row and column means of the squares (Shazeer and Stern 2018, arXiv:1804.04235)."""
    count = math.prod(size)
    return 4 * (count // size[-1] + count // size[-2]) if len(size) > 1 else 4 * count


def _nothing(size: tuple[int, ...]) -> int:
    return 0


OPTIMIZERS: Mapping[str, Callable[[tuple[int, ...]], int]] = {
    "adamw_torch": _adam_torch,
    "adamw_torch_fused": _adam_torch,
    "adamw_8bit": _adam_8bit,
    "adamw_bnb_8bit": _adam_8bit,
    "paged_adamw_32bit": _adam,
    "paged_adamw_8bit": _adam_8bit,
    "lion_32bit": _lion,
    "lion_8bit": _lion_8bit,
    "paged_lion_32bit": _lion,
    "paged_lion_8bit": _lion_8bit,
    "adafactor": _adafactor,
    "sgd": _nothing,
}
