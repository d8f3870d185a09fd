"""The study of frame policies."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from vqlora.config import RunSettings, Settings
from vqlora.experiments.overrides import overridden

JUDGED = ("uniform", "random", "keyframes", "packets", "top-k", "cumulative", "cumulative-coverage",
          "lowbit-cumulative", "lowbit-change", "segments", "own-segments", "diverse", "mmr", "encoder",
          "oracles")


class FramesSettings(Settings):
    """Notebook 07: policies judged on models trained once on mixed frames; and models trained per policy."""

    domains: tuple[str, ...] = Field(min_length=1)           # QLoRA on each, then judged
    untrained: tuple[str, ...] = ()                          # judged with the base as it is
    policies: tuple[str, ...] = JUDGED
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    untrained_counts: tuple[int, ...] = (4, 8)
    seeds: tuple[int, ...] = (0,)
    learning_rate: float = Field(1e-2, gt=0)                 # of every model
    steps: int = Field(40, ge=1)
    train_clips: int = Field(240, ge=1)
    val_clips: int = Field(64, ge=1)                         # the oracle, and policies, are chosen by these
    test_clips: int = Field(128, ge=1)
    per_policy: tuple[str, ...] = ("uniform", "packets", "cumulative-coverage")
    per_policy_counts: tuple[int, ...] = (4, 8)
    per_policy_domains: tuple[str, ...] = ()
    per_policy_seeds: tuple[int, ...] = (0,)
    long_videos: bool = True                                 # measure speed on long and real ones, too
    overrides: dict[str, Any] = {}                           # fields of RunSettings for every run

    @model_validator(mode="after")
    def _usable(self) -> FramesSettings:
        if not {"uniform", "oracles"} <= set(self.policies):
            raise ValueError("policies: needs 'uniform' and 'oracles', between which the others are placed")
        self.judged_runs(0.0), self.per_policy_runs(0.0)     # building them checks the overrides
        return self

    def judged_runs(self, learning_rate: float, *, base: str = "released") -> tuple[RunSettings, ...]:
        """One model per domain and seed, trained on mixed frames of several numbers, under every policy."""
        judged = {"judge": self.policies, "judge_clips": self.val_clips, "base": base, "bits": "nf4"}
        trained = {"arm": "qlora", "steps": self.steps, "learning_rate": learning_rate, "select": "mixed",
                   "train_frames": (4, 8), "judge_frames": self.counts}
        as_is = {"arm": "frozen", "steps": 0, "learning_rate": 0.0, "judge_frames": self.untrained_counts}
        pairs = [(domain, seed) for domain in self.domains for seed in self.seeds]
        return (*(self._run(*pair, **judged, **trained) for pair in pairs),
                *(self._run(domain, 0, **judged, **as_is) for domain in self.untrained))

    def per_policy_runs(self, learning_rate: float, *, base: str = "released") -> tuple[RunSettings, ...]:
        """Models trained and tested on the frames of one policy alone."""
        same = {"arm": "qlora", "bits": "nf4", "steps": self.steps, "learning_rate": learning_rate}
        return tuple(self._run(domain, seed, **same, base=base, select=policy, frames=count)
                     for domain in self.per_policy_domains for policy in self.per_policy
                     for count in self.per_policy_counts for seed in self.per_policy_seeds)

    def _run(self, domain: str, seed: int, **chosen: Any) -> RunSettings:
        chosen |= {"experiment": "07_frames", "domain": domain, "seed": seed, "train_clips": self.train_clips,
                   "eval_clips": self.test_clips, "eval_part": "test"}
        return overridden(chosen, self.overrides)
