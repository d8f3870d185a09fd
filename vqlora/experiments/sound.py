"""The study of an audio stream beside the frames."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vqlora.config import RunSettings, Settings
from vqlora.experiments.compared import MainSettings

Metric = Literal["nll", "qa_frac"]


class ListenSettings(Settings):
    """How the base learns to listen: an audio tower alone, on source clips drawn for it, the rest frozen."""

    seed: int = Field(0, ge=0)                               # of the clips and of the tower's first weights
    width: int = Field(128, ge=64, multiple_of=64)           # of the tower
    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1)
    frames: int = Field(2, ge=1)                             # shown beside the sound
    learning_rate: float = Field(1e-2, gt=0)
    warmup_steps: int = Field(20, ge=0)
    question_share: float = Field(0.4, ge=0, le=1)


class SoundClaim(Settings):
    """That arm `a` is better than arm `b` (greater), or no worse, in each of `metrics`."""

    a: str                                                   # arms by label
    b: str
    claim: Literal["greater", "no_worse"]
    family: Literal["sound", "beside"]                       # Holm's correction is within one
    metrics: tuple[Metric, ...] = ("nll", "qa_frac")


class SoundSettings(MainSettings):
    """Notebook 16: clips heard and seen at few frames, with controls, and seen alone at more.

    An arm that lists no rates to sweep takes those of the arm that `rates_of` names.
    """

    listen: ListenSettings = ListenSettings()
    claims: tuple[SoundClaim, ...] = Field(min_length=1)
    rates_of: dict[str, str] = {}
    margin_frac: float = Field(0.05, gt=0)                   # of right answers that count as equal

    @model_validator(mode="after")
    def _arms_are_there(self) -> SoundSettings:
        labels = {arm.label or arm.arm: arm for arm in self.arms}
        named = [("claims", name) for claim in self.claims for name in (claim.a, claim.b)]
        named += [("rates_of", name) for pair in self.rates_of.items() for name in pair]
        for key, name in named:
            if name not in labels:
                raise ValueError(f"{key}: {name!r} is no arm's label; allowed: {', '.join(labels)}")
        for name, other in self.rates_of.items():
            if labels[name].sweep or other in self.rates_of:
                raise ValueError(f"rates_of: {name!r} takes the rate of {other!r}; allowed: arms without a "
                                 "sweep, and an arm with a rate of its own")
        return self

    def runs(self, *, base: str = "released", experiment: str = "16_sound") -> tuple[RunSettings, ...]:
        """Settings of every run; `base` is one that listens, for arms with sound."""
        return super().runs(base=base, experiment=experiment)

    def sweep_runs(self, *, base: str = "released", experiment: str = "16_sweep") -> tuple[RunSettings, ...]:
        """Settings of the sweep, on validation."""
        return super().sweep_runs(base=base, experiment=experiment)
