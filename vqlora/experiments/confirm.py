"""Notebook 15: the primary claims once more, on seeds and clips that nothing was chosen by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vqlora.config import RunSettings, Settings
from vqlora.experiments.compared import MainSettings

PRIMARY = "primary"


class PairClaim(Settings):
    """That arm `a` is better than arm `b` (greater), no worse, or equivalent, in NLL, on each domain."""

    a: str                                                   # arms by label
    b: str
    claim: Literal["greater", "no_worse", "equivalent"]
    family: Literal["primary", "beside", "later"] = PRIMARY  # Holm's correction is within one


class ConfirmPart(MainSettings):
    """One recipe with the claims that it shall carry, written down before its first run."""

    name: str = Field(pattern=r"^[a-z]+$")
    claims: tuple[PairClaim, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _arms_are_there(self) -> ConfirmPart:
        labels = [arm.label or arm.arm for arm in self.arms]
        for claim in self.claims:
            if lacking := [arm for arm in (claim.a, claim.b) if arm not in labels]:
                raise ValueError(f"claims: {lacking[0]!r} is no arm's label; allowed: {', '.join(labels)}")
        return self

    @property
    def primary_count(self) -> int:
        """Primary comparisons of this part: each claim on each domain."""
        return len(self.domains) * sum(claim.family == PRIMARY for claim in self.claims)

    def runs(self, *, base: str = "released",
             experiment: str = "15_confirmation") -> tuple[RunSettings, ...]:
        """Settings of every run."""
        return super().runs(base=base, experiment=experiment)
