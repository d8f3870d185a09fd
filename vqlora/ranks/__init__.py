"""Rank allocation under a budget: what layers are worth (`signals`), whole ranks (`budget`), while training
(`scheduler`)."""

from vqlora.ranks.allocate import (
    allocate_ranks,
    costs_of,
    load_reference,
    measure_reference,
    save_reference,
)
from vqlora.ranks.signals import quantization_errors

__all__ = [
    "allocate_ranks", "costs_of", "load_reference", "measure_reference", "quantization_errors",
    "save_reference",
]  # fmt: skip
