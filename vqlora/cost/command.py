"""What `vqlora plan` prints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft import LoraConfig
from transformers import PreTrainedConfig

from vqlora.adapter import VQLoraConfig
from vqlora.cost.build import read_config
from vqlora.cost.inputs import is_video_config
from vqlora.cost.plan import MemoryPlan, plan_memory, read_bytes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answer:
    """A plan and, for a card, what fits on it and what helps."""

    plan: MemoryPlan
    card: str | None
    room: int | None
    fit: dict[str, int] | None
    advice: pd.DataFrame | None

    def to_dict(self) -> dict:
        rows = None if self.advice is None else self.advice.to_dict("records")
        return {**self.plan.to_dict(), "card_bytes": self.room, "fit": self.fit, "advice": rows}

    def __str__(self) -> str:
        if self.card is None:
            return str(self.plan)
        lines = [str(self.plan), ""]
        over = self.plan.train_bytes - self.room
        lines.append(f"training {'does not fit' if over > 0 else 'fits'} on {self.card}: "
                     f"{abs(over) / 2**20:,.0f} MiB {'too much' if over > 0 else 'to spare'}")  # fmt: skip
        lines.append(f"largest batch: {self.fit['batch']}; most frames: {self.fit['frames']}")
        if over > 0:
            lines.append("what to change first:")
            for row in self.advice.itertuples():
                still = "" if row.fits else ", still too much"
                lines.append(f"  {row.change}: {row.saves_bytes / 2**20:,.0f} MiB less{still}")
        return "\n".join(lines)


def describe_plan(chosen: argparse.Namespace) -> Answer:
    """The plan that the command's options ask for. Raises ValueError as `plan_memory` does."""
    _, config = read_config(chosen.model)
    plan = plan_memory(
        config,
        None if chosen.full else _adapter(config, chosen),
        bits=chosen.bits,
        frames=chosen.frames,
        tokens_per_frame=chosen.tokens_per_frame,
        prompt=chosen.prompt,
        answer=chosen.answer,
        batch=chosen.batch,
        gradient_checkpointing=chosen.checkpointing,
        optimizer=chosen.optimizer,
        dtype=chosen.dtype,
        full=chosen.full,
        device=chosen.device,
    )
    if chosen.card is None:
        return Answer(plan, None, None, None, None)
    room = read_bytes(chosen.card) - read_bytes(chosen.reserve)
    advice = plan.advice(chosen.card, reserve=chosen.reserve) if plan.train_bytes > room else None
    return Answer(plan, chosen.card, room, plan.fit(chosen.card, reserve=chosen.reserve), advice)


def _adapter(config: PreTrainedConfig, chosen: argparse.Namespace) -> LoraConfig:
    if not is_video_config(config):
        return LoraConfig(r=chosen.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    parts = {"modalities": chosen.modalities} if chosen.modalities else {}
    return VQLoraConfig(r=chosen.rank, gate=chosen.gate, **parts)
