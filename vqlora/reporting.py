"""Loggers beside TensorBoard: whatever the Trainer's `report_to` takes.

    with reporting(("wandb",)):
        trainer = Trainer(...)

The loop that trains knows nothing of it, so that a run is the same run with any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import trainer
from transformers.integrations import get_reporting_integration_callbacks


@contextmanager
def reporting(names: Sequence[str]) -> Iterator[None]:
    """Every Trainer made inside reports to these as well. Raises ValueError for a name it does not know."""
    try:
        added = get_reporting_integration_callbacks(list(names))
    except ValueError as fault:
        raise ValueError(f"report_to: {fault}") from None
    trainer.DEFAULT_CALLBACKS.extend(added)
    try:
        yield
    finally:
        for callback in added:
            trainer.DEFAULT_CALLBACKS.remove(callback)
