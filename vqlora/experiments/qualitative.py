"""The settings of the qualitative study: one small gated model, whose attention and gates are looked at."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from vqlora.config import RunSettings, Settings
from vqlora.experiments.overrides import overridden


class QualitativeSettings(Settings):
    """Notebook 12: captions of the main comparison, and one model with a gate for each rank."""

    domain: str = "cutaways"                                 # of the model: captions name a spliced-in shot
    arm: str = "qlora"                                       # of 03, by whose NLL clips are chosen
    steps: int = Field(40, ge=1)
    train_clips: int = Field(480, ge=1)
    clips: int = Field(96, ge=2)                             # of the test part
    seed: int = Field(0, ge=0)
    learning_rate: float = Field(5e-3, gt=0)                 # as notebook 05 chose them on validation
    gate_rate: float = Field(20.0, gt=0)
    overrides: dict[str, Any] = {"rank": 4, "alpha": 8, "batch_size": 16}    # further fields of RunSettings

    @model_validator(mode="after")
    def _usable(self) -> QualitativeSettings:
        self.run("")                                         # building it checks the overrides
        return self

    def run(self, save_to: str, *, base: str = "released") -> RunSettings:
        """Settings of the one run, whose model is kept in `save_to`."""
        chosen = {"experiment": "12_qualitative", "label": "rank", "arm": "vqlora", "bits": "nf4",
                  "gate": "rank", "domain": self.domain, "seed": self.seed, "steps": self.steps,
                  "learning_rate": self.learning_rate, "gate_rate": self.gate_rate,
                  "train_clips": self.train_clips, "eval_clips": self.clips, "eval_part": "test",
                  "base": base, "save_to": save_to or None}
        return overridden(chosen, self.overrides)
