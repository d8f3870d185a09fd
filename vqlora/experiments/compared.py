"""Comparisons of arms over domains and seeds: the main one, and those of gates, ranks and bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from vqlora.config import Arm, Bits, RunSettings, Settings, arm_name, check_arm
from vqlora.settings_file import ConfigError, parse


class ArmSettings(Settings):
    """One compared method; `learning_rate` is used where no swept rate is on file."""

    label: str | None = None                                 # where several methods are one arm
    arm: Arm
    bits: Bits
    learning_rate: float = Field(ge=0)
    sweep: tuple[float, ...] = ()                            # learning rates to try on validation
    overrides: dict[str, Any] = {}                           # fields of RunSettings for this arm alone

    @model_validator(mode="after")
    def _arm_fits_bits(self) -> ArmSettings:
        return check_arm(self)

    @property
    def name(self) -> str:
        return arm_name(self.label or self.arm, self.bits)


class MainSettings(Settings):
    """The main comparison: every arm on every domain with every seed; before it, learning rates swept."""

    domains: tuple[str, ...] = Field(min_length=1)
    arms: tuple[ArmSettings, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    steps: int = Field(ge=1)
    train_clips: int = Field(ge=1)
    eval_clips: int = Field(ge=1)
    eval_part: Literal["val", "devtest", "test"] = "test"
    overrides: dict[str, Any] = {}                           # fields of RunSettings for every arm
    margin_nll: float = Field(0.05, gt=0)                    # nats a token that count as equal
    sweep_domains: tuple[str, ...] = ()                      # to tune on; empty: `domains`
    sweep_seeds: tuple[int, ...] = (1000,)                   # tuning has seeds of its own
    sweep_clips: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _usable(self) -> MainSettings:
        for label, values in (("domains", self.domains), ("seeds", self.seeds),
                              ("arms", [arm.name for arm in self.arms])):
            twice = sorted({str(v) for v in values if list(values).count(v) > 1})
            if twice:
                raise ValueError(f"{label}: {', '.join(twice)} given twice")
        both = set(self.seeds) & set(self.sweep_seeds)
        if both and any(arm.sweep for arm in self.arms):
            raise ValueError(f"sweep_seeds: {min(both)} is also in seeds; the sweep needs seeds of its own")
        self.runs(), self.sweep_runs()                       # building them checks the overrides
        return self

    def runs(self, *, base: str = "released", experiment: str = "03_main") -> tuple[RunSettings, ...]:
        """Settings of every run, at the profile's learning rates."""
        return tuple(self._run(arm, domain, seed, arm.learning_rate, base, experiment,
                               self.eval_part, self.eval_clips)
                     for domain in self.domains for arm in self.arms for seed in self.seeds)

    def sweep_runs(self, *, base: str = "released", experiment: str = "03_sweep") -> tuple[RunSettings, ...]:
        """Settings of the learning-rate sweep, scored on validation; empty where no arm lists rates."""
        return tuple(self._run(arm, domain, seed, rate, base, experiment, "val", self.sweep_clips)
                     for domain in self.sweep_domains or self.domains for arm in self.arms
                     for rate in arm.sweep for seed in self.sweep_seeds)

    def _run(self, arm, domain, seed, rate, base, experiment, part, clips) -> RunSettings:
        chosen = {"experiment": experiment, "label": arm.label, "arm": arm.arm, "bits": arm.bits,
                  "domain": domain, "seed": seed, "learning_rate": rate, "steps": self.steps,
                  "train_clips": self.train_clips, "base": base, "eval_part": part, "eval_clips": clips}
        for key in (*self.overrides, *arm.overrides):
            if key in chosen and key != "steps":
                free = [name for name in RunSettings.model_fields if name not in chosen or name == "steps"]
                raise ValueError(f"overrides: {key!r} is set by the comparison itself; "
                                 f"allowed: {', '.join(free)}")
        try:
            return parse(RunSettings, {**chosen, **self.overrides, **arm.overrides}, "overrides")
        except ConfigError as fault:
            raise ValueError(str(fault).splitlines()[0]) from None


class RankSettings(MainSettings):
    """A comparison of rank allocations at one budget, and of `more_arms` at `more_budgets` beside it.

    Learning rates to try at another budget, for every arm: those of `more_sweeps` there.
    """

    budget: int = Field(ge=1)                                # trainable parameters
    more_budgets: tuple[int, ...] = ()
    more_arms: tuple[str, ...] = ()                          # by label; empty: all
    more_sweeps: dict[int, tuple[float, ...]] = {}           # budget: rates to try on validation

    @model_validator(mode="after")
    def _known(self) -> RankSettings:
        labels = [arm.label or arm.arm for arm in self.arms]
        if unknown := sorted(set(self.more_arms) - set(labels)):
            raise ValueError(f"more_arms: {unknown[0]!r} is no arm's label; allowed: " + ", ".join(labels))
        if self.budget in self.more_budgets:
            raise ValueError(f"more_budgets: {self.budget} is the budget itself")
        if lost := sorted(set(self.more_sweeps) - set(self.more_budgets)):
            raise ValueError(f"more_sweeps: {lost[0]} is none of more_budgets; allowed: "
                             + (", ".join(map(str, self.more_budgets)) or "none"))
        if wrong := [rate for own in self.more_sweeps.values() for rate in own if rate <= 0]:
            raise ValueError(f"more_sweeps: {wrong[0]}; allowed: rates above 0")
        return self

    def at(self, budget: int) -> RankSettings:
        """The comparison of `more_arms` at another budget, and its sweep."""
        kept = self.more_arms or [arm.label or arm.arm for arm in self.arms]
        rates = {"sweep": self.more_sweeps.get(budget, ())}
        arms = tuple(arm.model_copy(update=rates) for arm in self.arms if (arm.label or arm.arm) in kept)
        return self.model_copy(update={"budget": budget, "arms": arms})

    def _run(self, arm, *named) -> RunSettings:
        overrides = {"budget": self.budget, **arm.overrides}
        return super()._run(arm.model_copy(update={"overrides": overrides}), *named)


class TemporalSettings(MainSettings):
    """Notebook 05: gates on adapters of one rank, with controls; `more_domains` see the `fewer` arms alone.

    An arm with a gate is swept over its learning rates and `gate_rates` together.
    """

    more_domains: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ("plain", "rank")               # arms, by label
    gate_rates: tuple[float, ...] = ()                       # times the learning rate

    def runs(self, *, base: str = "released",
             experiment: str = "05_temporal") -> tuple[RunSettings, ...]:
        """Settings of every run: all arms on `domains`, then the `fewer` on `more_domains`."""
        unknown = sorted(set(self.fewer) - {arm.label for arm in self.arms})
        if self.more_domains and unknown:
            raise ValueError(f"fewer: {unknown[0]!r} is no arm's label; allowed: "
                             + ", ".join(arm.label or arm.arm for arm in self.arms))
        arms = tuple(arm for arm in self.arms if arm.label in self.fewer)
        more = self.model_copy(update={"domains": self.more_domains, "arms": arms})
        how = {"base": base, "experiment": experiment}
        return tuple(run for part in (self, more) for run in MainSettings.runs(part, **how))

    def sweep_runs(self, *, base: str = "released",
                   experiment: str = "05_sweep") -> tuple[RunSettings, ...]:
        """Settings of the sweep: every learning rate of an arm and, where it has a gate, every gate rate."""
        runs = super().sweep_runs(base=base, experiment=experiment)
        return tuple(run.model_copy(update={"gate_rate": rate}) for run in runs
                     for rate in (self.gate_rates if run.gate != "none" else ()) or (run.gate_rate,))


class BitsSettings(MainSettings):
    """Notebook 08: the base in several bits, scored as it is on its source, and fine-tuned on shifts.

    An arm whose label names a base of `vqlora.studies.bit_study` (`mixed-25`, `int2`) starts from that one.
    """

    source_clips: int = Field(384, ge=1)                     # of validation, its first: scored
    calibration_clips: int = Field(64, ge=1)                 # its last: what a layer loses is read off these
    mixed: tuple[int, ...] = (10, 25, 50)                    # memory allowed, per cent from NF4 to 16 bits
    draws: int = Field(3, ge=1)                              # of layers kept at random, to compare with
    simulated: tuple[int, ...] = (3, 2)
    checks: tuple[int, ...] = tuple(range(20))               # `vqlora.cost.check.SETTINGS` to measure
    sizes: tuple[str, ...] | None = None                     # to predict; empty: all; None: as committed

    def frozen_runs(self, bases: Iterable[Any], *, experiment: str = "08_bits") -> tuple[RunSettings, ...]:
        """The frozen base on source validation clips, once for each of `bases` (`bit_study.Base`)."""
        same = {"experiment": experiment, "arm": "frozen", "domain": "source", "learning_rate": 0.0,
                "steps": 0, "train_clips": 1, "eval_clips": self.source_clips, "eval_part": "val"}
        return tuple(RunSettings(**same, label=base.label, bits=base.bits, base=base.source, seed=base.seed)
                     for base in bases)

    def tuned_runs(self, bases: Iterable[Any], *, sweep: bool = False,
                   experiment: str = "08_bits") -> tuple[RunSettings, ...]:
        """Every arm on every domain with every seed, from the base in its bits; or the sweep before it."""
        sources = {base.label: base.source for base in bases if base.seed == 0}
        lacking = sorted({arm.label or "none" for arm in self.arms} - set(sources))
        if lacking:
            raise ValueError(f"arms: label {lacking[0]!r} is no base; allowed: {', '.join(sources)}")
        how = {"base": "", "experiment": experiment}
        runs = self.sweep_runs(**how) if sweep else self.runs(**how)
        return tuple(run.model_copy(update={"base": sources[run.label]}) for run in runs)
