"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RunResult:
    """`metrics` come out the same when repeated, `cost` is bound to the machine."""

    metrics: dict[str, float]
    cost: dict[str, float]
    examples: pandas.DataFrame | None = None  # one row per clip and task item
