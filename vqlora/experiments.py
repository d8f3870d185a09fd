"""Typed settings of whole experiments, i.e. which runs a notebook asks for; a profile holds one of each.

    profile = load_profile("cpu")                 # configs/cpu.yaml
    runs = profile.main.runs()                    # tuple of RunSettings
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vqlora.config import (
    Arm,
    Bits,
    DataSettings,
    DataSource,
    PartCounts,
    PretrainSettings,
    RunSettings,
    Settings,
    arm_name,
    check_arm,
)
from vqlora.settings_file import ConfigError, nearest, parse, read_mapping

JUDGED = ("uniform", "random", "keyframes", "packets", "top-k", "cumulative", "cumulative-coverage",
          "lowbit-cumulative", "lowbit-change", "segments", "diverse", "mmr", "encoder", "oracles")


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

    def runs(self, learning_rates: Mapping[str, float] | None = None, *, base: str = "released",
             experiment: str = "03_main") -> tuple[RunSettings, ...]:
        """Settings of every run; `learning_rates` by arm name (see `swept_rates`) replace the profile's."""
        rates = learning_rates or {}
        return tuple(self._run(arm, domain, seed, rates.get(arm.name, arm.learning_rate), base, experiment,
                               self.eval_part, self.eval_clips)
                     for domain in self.domains for arm in self.arms for seed in self.seeds)

    def sweep_runs(self, *, base: str = "released", experiment: str = "03_sweep") -> tuple[RunSettings, ...]:
        """Settings of the learning-rate sweep, scored on validation; empty where no arm lists rates."""
        return tuple(self._run(arm, domain, seed, rate, base, experiment, "val", self.sweep_clips)
                     for domain in self.domains for arm in self.arms
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


class FramesSettings(Settings):
    """Notebook 07: policies judged on models trained once on mixed frames; and models trained per policy."""

    domains: tuple[str, ...] = Field(min_length=1)           # QLoRA on each, then judged
    untrained: tuple[str, ...] = ()                          # judged with the base as it is
    policies: tuple[str, ...] = JUDGED
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    untrained_counts: tuple[int, ...] = (4, 8)
    seeds: tuple[int, ...] = (0,)
    learning_rate: float = Field(1e-2, gt=0)                 # where no swept rate is on file
    steps: int = Field(40, ge=1)
    train_clips: int = Field(240, ge=1)
    val_clips: int = Field(64, ge=1)                         # the oracle is chosen by these
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
        for key in self.overrides:
            if key in chosen:
                raise ValueError(f"overrides: {key!r} is set by the experiment itself")
        try:
            return parse(RunSettings, {**chosen, **self.overrides}, "overrides")
        except ConfigError as fault:
            raise ValueError(str(fault).splitlines()[0]) from None


class RankSettings(MainSettings):
    """A comparison of rank allocations at one budget; `more_budgets` are for tables beside it."""

    budget: int = Field(ge=1)                                # trainable parameters
    more_budgets: tuple[int, ...] = ()

    def at(self, budget: int) -> RankSettings:
        """The same comparison at another budget."""
        return self.model_copy(update={"budget": budget})

    def _run(self, arm, *named) -> RunSettings:
        overrides = {"budget": self.budget, **arm.overrides}
        return super()._run(arm.model_copy(update={"overrides": overrides}), *named)


class TemporalSettings(MainSettings):
    """Notebook 05: gates on adapters of one rank, with controls; `more_domains` see the `fewer` arms alone.

    An arm with a gate is swept over its learning rates and `gate_rates` together.
    """

    more_domains: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ("plain", "rank")               # arms, by label
    sweep_domains: tuple[str, ...] = ()                      # to tune on; empty: `domains`
    gate_rates: tuple[float, ...] = ()                       # times the learning rate

    def runs(self, learning_rates: Mapping[str, float] | None = None, *, base: str = "released",
             experiment: str = "05_temporal") -> tuple[RunSettings, ...]:
        """Settings of every run: all arms on `domains`, then the `fewer` on `more_domains`."""
        unknown = sorted(set(self.fewer) - {arm.label for arm in self.arms})
        if self.more_domains and unknown:
            raise ValueError(f"fewer: {unknown[0]!r} is no arm's label; allowed: "
                             + ", ".join(arm.label or arm.arm for arm in self.arms))
        arms = tuple(arm for arm in self.arms if arm.label in self.fewer)
        more = self.model_copy(update={"domains": self.more_domains, "arms": arms})
        how = {"base": base, "experiment": experiment}
        return tuple(run for part in (self, more)
                     for run in MainSettings.runs(part, learning_rates, **how))

    def sweep_runs(self, *, base: str = "released",
                   experiment: str = "05_sweep") -> tuple[RunSettings, ...]:
        """Settings of the sweep: every learning rate of an arm and, where it has a gate, every gate rate."""
        tuned = self.model_copy(update={"domains": self.sweep_domains or self.domains})
        runs = MainSettings.sweep_runs(tuned, base=base, experiment=experiment)
        return tuple(run.model_copy(update={"gate_rate": rate}) for run in runs
                     for rate in (self.gate_rates if run.gate != "none" else ()) or (run.gate_rate,))


class BitsSettings(MainSettings):
    """Notebook 08: the base in several bits, scored as it is on its source, and fine-tuned on shifts.

    An arm whose label names a base of `vqlora.bit_study` (`mixed-25`, `int2`) starts from that one.
    """

    source_clips: int = Field(384, ge=1)                     # of validation, its first: scored
    calibration_clips: int = Field(64, ge=1)                 # its last: what a layer loses is read off these
    mixed: tuple[int, ...] = (10, 25, 50)                    # memory allowed, per cent from NF4 to 16 bits
    draws: int = Field(3, ge=1)                              # of layers kept at random, to compare with
    simulated: tuple[int, ...] = (3, 2)
    checks: tuple[int, ...] = tuple(range(20))               # `vqlora.cost.check.SETTINGS` to measure
    sizes: tuple[str, ...] | None = None                     # to predict; empty: all; None: as committed

    def frozen_runs(self, bases: Iterable[Any], *, experiment: str = "08_bits") -> tuple[RunSettings, ...]:
        """The frozen base on source validation clips, once for each of `bases` (`vqlora.bit_study.Base`)."""
        same = {"experiment": experiment, "arm": "frozen", "domain": "source", "learning_rate": 0.0,
                "steps": 0, "train_clips": 1, "eval_clips": self.source_clips, "eval_part": "val"}
        return tuple(RunSettings(**same, label=base.label, bits=base.bits, base=base.source, seed=base.seed)
                     for base in bases)

    def tuned_runs(self, learning_rates: Mapping[str, float], bases: Iterable[Any], *, sweep: bool = False,
                   experiment: str = "08_bits") -> tuple[RunSettings, ...]:
        """Every arm on every domain with every seed, from the base in its bits; or the sweep before it."""
        sources = {base.label: base.source for base in bases if base.seed == 0}
        lacking = sorted({arm.label or "none" for arm in self.arms} - set(sources))
        if lacking:
            raise ValueError(f"arms: label {lacking[0]!r} is no base; allowed: {', '.join(sources)}")
        how = {"base": "", "experiment": experiment}
        runs = self.sweep_runs(**how) if sweep else self.runs(learning_rates, **how)
        return tuple(run.model_copy(update={"base": sources[run.label]}) for run in runs)


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

    @model_validator(mode="after")
    def _usable(self) -> CostModel:
        if self.at not in self.frames:
            raise ValueError(f"at: {self.at}; allowed: one of frames, {', '.join(map(str, self.frames))}")
        return self

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

    @model_validator(mode="after")
    def _all_arms(self) -> CostSettings:
        missing = [arm for arm in STEP_ARMS if arm not in self.arms]
        if missing:
            raise ValueError(f"arms: {missing[0]!r} is missing; claims and aims need {', '.join(STEP_ARMS)}")
        return self

    @property
    def main(self) -> CostModel:
        return self.models[-1]


class Profile(Settings):
    """A named set of settings for the whole chain of notebooks; a profile is a file."""

    name: str
    in_place: bool = False                                   # True: also writes figures/ and paper/generated/
    data: DataSettings | None = None                         # what is rendered
    base: PretrainSettings = PretrainSettings()
    main: MainSettings | None = None
    frames: FramesSettings | None = None                     # of notebook 07
    temporal: TemporalSettings | None = None                 # of notebook 05
    ranks: RankSettings | None = None                        # of notebook 06; each arm an allocator
    cost: CostSettings | None = None                         # of notebook 04
    bits: BitsSettings | None = None                         # of notebook 08
    hub: tuple[HubSettings, ...] = ()                        # of notebook 14
    card: str | None = None                                  # that its runs shall fit, e.g. 24GB
    workers: int = Field(2, ge=1)                            # runs at a time, one process each
    expected_s: dict[str, float] = {}                        # by notebook, until it was measured here

    @model_validator(mode="after")
    def _data_is_there(self) -> Profile:
        parts = [("main", self.main), ("temporal", self.temporal), ("ranks", self.ranks), ("bits", self.bits)]
        for label, part in parts + [(f"hub[{n}]", part) for n, part in enumerate(self.hub)]:
            if part is not None:
                self._check_domains(label, part)
        twice = sorted({name for part in self.hub for name in part.domains
                        if sum(name in other.domains for other in self.hub) > 1})
        if twice:
            raise ValueError(f"hub: domain {twice[0]!r} is in two comparisons; their results would be mixed")
        if self.card is not None:
            for part in self.hub:
                part.on(self.card)
        if self.bits is not None:
            self._check_bits()
        if self.frames is not None:
            self._check_frames()
        return self

    def _check_bits(self) -> None:
        wanted, have = self.bits.source_clips + self.bits.calibration_clips, self._rendered().get("source")
        if have is None or wanted > have.val:
            raise ValueError(f"bits.source_clips: with calibration_clips {wanted}, more than "
                             f"data.domains.source.val ({have.val if have else 0})")

    def _check_frames(self) -> None:
        trained = (*self.frames.domains, *self.frames.per_policy_domains)
        for domain in (*trained, *self.frames.untrained):
            have = self._rendered().get(domain, PartCounts())
            for key, part in (("train_clips", "train"), ("val_clips", "val"), ("test_clips", "test")):
                if (part != "train" or domain in trained) and getattr(self.frames, key) > getattr(have, part):
                    raise ValueError(f"frames.{key}: {getattr(self.frames, key)} is more than "
                                     f"data.domains.{domain}.{part} ({getattr(have, part)})")

    def _rendered(self) -> dict[str, PartCounts]:
        return self.data.domains if self.data else {}

    def _check_domains(self, label: str, compared: MainSettings) -> None:
        rendered, own = self._rendered(), getattr(compared, "sources", {})
        for run in compared.runs() + compared.sweep_runs():
            if run.domain in own:
                continue
            if run.domain not in rendered:
                raise ValueError(f"{label}.domains: {run.domain!r} is not in data.domains; allowed: "
                                 + (", ".join((*rendered, *own)) or "none, there is no data"))
            have = rendered[run.domain]
            for key, part in (("train_clips", "train"), ("eval_clips", run.eval_part)):
                if getattr(run, key) > getattr(have, part):
                    raise ValueError(f"{label}.{key}: {getattr(run, key)} is more than "
                                     f"data.domains.{run.domain}.{part} ({getattr(have, part)})")


def load_profile(name_or_path: str | Path, root: str | Path = ".") -> Profile:
    """Read a profile by name (`cpu` is `<root>/configs/cpu.yaml`) or by path. Raises ConfigError."""
    text = str(name_or_path)
    if re.fullmatch(r"[\w-]+", text):
        path = Path(root, "configs", f"{text}.yaml")
        if not path.is_file():
            names = sorted(p.stem for p in Path(root, "configs").glob("*.yaml"))
            raise ConfigError(f"profile {text!r} is not known{nearest(text, names)}; "
                              f"allowed: {', '.join(names)}")
    else:
        path = Path(text)
    values = read_mapping(path)
    values.setdefault("name", path.stem)
    if values["name"] != path.stem:
        raise ConfigError(f"{path}: name: {values['name']!r} does not match the file; allowed: {path.stem!r}")
    return parse(Profile, values, path)
