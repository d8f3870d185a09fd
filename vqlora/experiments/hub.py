"""The main comparison on a checkpoint, and how a base is made of a pretrained decoder."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from vqlora.config import DataSource, RunSettings, Settings
from vqlora.experiments.compared import MainSettings
from vqlora.settings_file import parse


class AlignSettings(Settings):
    """How `vqlora.hub.small` makes a base of a pretrained decoder and the released base's vision tower."""

    domain: str = "source"                                   # whose training clips it sees
    clips: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    distil_steps: int = Field(400, ge=0)
    steps: int = Field(ge=0)
    limit_s: float = Field(900, gt=0)                        # of the steps
    batch_size: int = Field(8, ge=1)
    frames: int = Field(4, ge=1)
    question_share: float = Field(0.3, ge=0, le=1)
    learning_rate: float = Field(1e-3, gt=0)


class HubSettings(MainSettings):
    """Notebook 14: the main comparison on a checkpoint in hub layout, on rendered data or on a person's own.

    `cards` holds, by size of a card, fields of RunSettings with which every arm fits (`vqlora.cost.cards`).
    """

    base: str | None = None                                  # folder or hub id; None: made as `align` says
    align: AlignSettings | None = None
    sources: dict[str, DataSource] = {}                      # by domain; other domains are rendered
    shape: str | None = None                                 # its name in `vqlora.cost.sizes.CONFIGS`
    cards: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _one_base(self) -> HubSettings:
        if (self.base is None) == (self.align is None):
            raise ValueError("base: give either a base or align, which makes one")
        for card in self.cards:
            self.on(card)                                    # building its runs checks its overrides
        return self

    def on(self, card: str | None) -> HubSettings:
        """The comparison as it fits a card; None: as it is. Raises ValueError for a size without settings."""
        if card is None:
            return self
        if card not in self.cards:
            raise ValueError(f"card: {card!r} has no settings; allowed: {', '.join(self.cards) or 'none'}")
        changed = {"overrides": {**self.overrides, **self.cards[card]}, "cards": {}}
        return parse(HubSettings, {**self.model_dump(mode="json"), **changed}, f"cards.{card}")

    def _run(self, arm, domain, *named) -> RunSettings:
        run = super()._run(arm, domain, *named)
        return run.model_copy(update={"data": self.sources.get(domain)})
