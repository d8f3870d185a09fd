"""Sizes of rank, parts of the model, training clips and sizes of the base: notebooks 09 and 10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from vqlora.config import PretrainSettings, RunSettings, Settings
from vqlora.experiments.compared import MainSettings


class PlacementSettings(MainSettings):
    """Notebook 09: several ranks on all layers, and one budget of parameters on a part of the model alone.

    An arm that names `modalities` spends `budget` on their layers, in ranks that differ by at most one.
    """

    budget: int = Field(ge=1)                                # trainable parameters

    def _run(self, arm, *named) -> RunSettings:
        if "modalities" in arm.overrides:
            overrides = {"ranks": "uniform", "budget": self.budget, **arm.overrides}
            arm = arm.model_copy(update={"overrides": overrides})
        return super()._run(arm, *named)


class BaseSize(Settings):
    """One base of the study of sizes: what of `PretrainSettings` makes it larger or smaller."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    width: int = Field(ge=64, multiple_of=64)                # of the decoder
    layers: int = Field(ge=1)
    vision_width: int = Field(ge=64, multiple_of=64)
    vision_layers: int = Field(ge=1)

    def recipe(self, common: PretrainSettings) -> PretrainSettings:
        """The common recipe at this size."""
        return common.model_copy(update=self.model_dump(exclude={"name"}))


class ScalingSettings(Settings):
    """Notebook 10: an arm of notebook 09 with fewer training clips; bases of several sizes by one recipe."""

    arm: str = "rank-4"                                      # by its label there
    clips: tuple[int, ...] = ()                              # for training, fewer than 09's
    bases: tuple[BaseSize, ...] = ()                         # trained from scratch, `base` the recipe
    resamples: int = Field(1000, ge=100)                     # of the bootstrap

    @model_validator(mode="after")
    def _told_apart(self) -> ScalingSettings:
        for label, values in (("clips", self.clips), ("bases", [size.name for size in self.bases])):
            if twice := sorted({str(v) for v in values if list(values).count(v) > 1}):
                raise ValueError(f"{label}: {', '.join(twice)} given twice")
        return self

    def clip_runs(self, placement: PlacementSettings, *, base: str = "released") -> tuple[RunSettings, ...]:
        """The arm on the first `clips` training clips of each domain, every seed; steps stay the same."""
        many = [count for count in self.clips if count >= placement.train_clips]
        if many:
            raise ValueError(f"clips: {many[0]}; allowed: fewer than placement.train_clips "
                             f"({placement.train_clips})")
        return tuple(run for count in self.clips
                     for run in self._runs(placement, base=base, train_clips=count))

    def base_runs(self, placement: PlacementSettings, folders: Mapping[str, str], *,
                  sweep: bool = False) -> tuple[RunSettings, ...]:
        """The arm on each of these bases (name -> folder), all else as in notebook 09; or its sweep there."""
        return tuple(run.model_copy(update={"label": name}) for name, folder in folders.items()
                     for run in self._runs(placement, base=folder, sweep=sweep))

    def _runs(self, placement, *, base: str, sweep: bool = False, **changed: Any) -> tuple[RunSettings, ...]:
        arms = tuple(arm for arm in placement.arms if (arm.label or arm.arm) == self.arm)
        if not arms:
            raise ValueError(f"arm: {self.arm!r} is no arm of placement; allowed: "
                             + ", ".join(arm.label or arm.arm for arm in placement.arms))
        one = placement.model_copy(update={"arms": arms, **changed})
        if sweep:
            return one.sweep_runs(base=base, experiment="10_sweep")
        return one.runs(base=base, experiment="10_scaling")
