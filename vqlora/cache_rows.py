"""Key/value caches that are cut and joined by hand keep what adapters know of the frames behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HELD = "_vqlora_rows"  # where `vqlora.adapter` leaves the features of a cache's rows, if it has any


def take_rows(cache: Any, rows: Sequence[int]) -> None:
    """Keep these rows of a key/value cache, in this order, in place, with what is known of their frames."""
    held = _held(cache)
    index = torch.tensor(list(rows), device=cache.layers[0].keys.device)
    cache.batch_select_indices(index)
    if held:
        setattr(cache, HELD, {name: f[index.to(f.device)] for name, f in held.items()})


def join_rows(caches: Sequence[Any], into: Any) -> None:
    """`into` will hold the rows of all caches one after the other: it takes what is known of their frames.

    Call it before the keys are joined.
    """
    held = [_held(cache) for cache in caches]
    if all(held):
        setattr(into, HELD, {name: torch.cat([h[name] for h in held]) for name in held[0]})


def _held(cache: Any) -> dict[str, Tensor]:
    """{adapter: [R, n]}, one row of features per row of the cache (a text without video has a single one)."""
    rows = len(cache.layers[0].keys)
    return {name: f.repeat_interleave(rows // len(f), dim=0) for name, f in getattr(cache, HELD, {}).items()}
