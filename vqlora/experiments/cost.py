"""The study of what a step costs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vqlora.config import Settings

STEP_ARMS = ("qlora", "lora", "full", "vqlora", "vqlora+lean", "vqlora+lean+ckpt")


class CostModel(Settings):
    """A model of `vqlora.cost.bench_models` whose steps are measured, and at which settings.

    Frames vary at `rank`, ranks at `at` frames, where aims are read and answers timed as well.
    """

    model: str
    batch: int = Field(1, ge=1)                              # clips
    frames: tuple[int, ...] = Field((4, 16), min_length=1)   # a clip
    at: int = 16
    rank: int = Field(8, ge=1)
    ranks: tuple[int, ...] = ()                              # others
    rounds: int = Field(3, ge=1)                             # of timed steps, every arm once in each
    rounds_at: int | None = Field(None, ge=1)                # where aims are read; None: as many

    @model_validator(mode="after")
    def _usable(self) -> CostModel:
        if self.at not in self.frames:
            raise ValueError(f"at: {self.at}; allowed: one of frames, {', '.join(map(str, self.frames))}")
        return self

    def rounds_of(self, case: dict[str, Any]) -> int:
        """How many rounds a setting of `cases` is timed for."""
        aims = case["frames"] == self.at and case["rank"] == self.rank
        return self.rounds_at if aims and self.rounds_at else self.rounds

    def cases(self) -> tuple[dict[str, Any], ...]:
        """(model, batch, frames, rank) of every setting, that of the aims first."""
        pairs = [(self.at, self.rank), *((count, self.rank) for count in self.frames),
                 *((self.at, rank) for rank in self.ranks)]
        return tuple({"model": self.model, "batch": self.batch, "frames": frames, "rank": rank}
                     for frames, rank in dict.fromkeys(pairs))


class CostSettings(Settings):
    """Notebook 04: what a step costs by method, model, frames and rank. The last model is the main one."""

    arms: tuple[str, ...] = STEP_ARMS                        # names of `vqlora.cost.bench.ARMS`
    models: tuple[CostModel, ...] = Field(
        (CostModel(model="KineVLM", batch=8, frames=(4, 8, 16, 32), at=8, ranks=(2, 32), rounds=7),
         CostModel(model="SmolVLM-135M")), min_length=1)
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ()         # to read the aims in, beside this machine's own

    @model_validator(mode="after")
    def _all_arms(self) -> CostSettings:
        missing = [arm for arm in STEP_ARMS if arm not in self.arms]
        if missing:
            raise ValueError(f"arms: {missing[0]!r} is missing; claims and aims need {', '.join(STEP_ARMS)}")
        return self

    @property
    def main(self) -> CostModel:
        return self.models[-1]
