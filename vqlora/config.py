"""Typed settings: one run, one profile; read from YAML or JSON.

A settings object is a value: frozen, comparable, written out in full by `model_dump`. Files are read
strictly (text is never taken for a number) and each fault is one line, `file: key: value, what is allowed`.

    profile = load_profile("cpu")                 # configs/cpu.yaml
    runs = profile.main.runs()                    # tuple of RunSettings
    settings = load_run("my_run.yaml")
"""
from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vqlora.settings_file import ConfigError, nearest, parse, read_mapping

__all__ = ["ArmSettings", "ConfigError", "DataSettings", "MainSettings", "PartCounts", "PretrainSettings",
           "Profile", "RunSettings", "arm_name", "load_profile", "load_run", "swept_rates"]

Arm = Literal["frozen", "full", "lora", "qlora", "vqlora"]
Bits = Literal["nf4", "fp4", "int8", "bf16"]
Part = Literal["train", "val", "devtest", "test"]
Language = Literal["en", "es", "de", "fr", "zh"]
Modality = Literal["vision", "fusion", "text", "audio"]

_BITS_OF_ARM = {"frozen": ("nf4", "fp4", "int8", "bf16"), "full": ("bf16",), "lora": ("bf16",),
                "qlora": ("nf4", "fp4", "int8"), "vqlora": ("nf4", "fp4", "int8", "bf16")}
JUDGED = ("uniform", "random", "keyframes", "packets", "top-k", "cumulative", "cumulative-coverage",
          "lowbit-cumulative", "lowbit-change", "segments", "diverse", "mmr", "encoder", "oracles")


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Settings):
    """One fine-tuning run. `experiment` is a label, not part of the run's identity (see `store.run_key`)."""

    experiment: str
    arm: Arm
    bits: Bits
    domain: str
    seed: int = Field(ge=0)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    modalities: tuple[Modality, ...] = Field(("vision", "fusion", "text"), min_length=1)
    layers: str | tuple[str, ...] = "attention+mlp"          # or "attention", or patterns of module names
    gate: Literal["none", "scalar", "rank", "mixture", "selective"] = "rank"  # of arm vqlora, as the next two
    control: Literal["constant", "shuffled", "random"] | None = None
    gate_rate: float = Field(5.0, gt=0)                      # times learning_rate
    gate_features: Literal["pixels", "scores"] = "pixels"    # or of all frames, as `select` sees them
    learning_rate: float = Field(ge=0)
    steps: int = Field(ge=0)
    batch_size: int = Field(32, ge=1)
    accumulation: int = Field(1, ge=1)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    contrastive_weight: float = Field(0.25, ge=0)
    question_share: float = Field(0.4, ge=0, le=1)
    frames: int = Field(8, ge=1)
    train_frames: tuple[int, ...] = ()                       # cycled over the steps; empty: `frames`
    select: str = "uniform"
    judge: tuple[str, ...] = ()                              # policies to evaluate instead of `select`
    judge_frames: tuple[int, ...] = ()                       # with as many frames each
    judge_clips: int = Field(0, ge=0)                        # also of validation, to choose a policy by
    train_clips: int = Field(ge=1)
    eval_clips: int = Field(ge=1)
    eval_part: Literal["val", "devtest", "test"] = "val"
    base: str = "released"
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    optimizer: str = "auto"

    @model_validator(mode="after")
    def _arm_fits_bits(self) -> RunSettings:
        if bool(self.judge) != bool(self.judge_frames):
            raise ValueError("judge: needs judge_frames, and judge_frames needs it")
        for key in ("train_frames", "judge_frames"):
            if min(getattr(self, key), default=1) < 1:
                raise ValueError(f"{key}: {min(getattr(self, key))} frames; at least 1 is allowed")
        return _check_arm(self)

    @property
    def name(self) -> str:
        """Short name for progress lines and messages, e.g. `03_main/language/qlora-nf4/seed1`."""
        return f"{self.experiment}/{self.domain}/{arm_name(self.arm, self.bits)}/seed{self.seed}"


class PartCounts(Settings):
    """Clips to render per part."""

    train: int = Field(0, ge=0)
    val: int = Field(0, ge=0)
    devtest: int = Field(0, ge=0)
    test: int = Field(0, ge=0)


class DataSettings(Settings):
    """What notebook 01 renders."""

    seed: int = Field(0, ge=0)
    domains: dict[str, PartCounts] = Field(min_length=1)
    languages: tuple[Language, ...] = Field(("en", "es", "de", "fr", "zh"), min_length=1)
    audio: bool = True


class PretrainSettings(Settings):
    """How notebook 02 trains the base from scratch, and whether it does so inside `make paper`.

    Batches count clips over all processes; the learning rate is the peak of a cosine.
    """

    pretrain: bool = False                                   # False: evaluate the released base only
    val_clips: int = Field(512, ge=1)
    seed: int = Field(0, ge=0)
    steps: int = Field(1000, ge=1)
    vision_steps: int = Field(200, ge=0)                     # of them: vision tower alone, on dense labels
    batch_size: int = Field(40, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    processes: int = Field(2, ge=1)                          # of one thread each
    width: int = Field(192, ge=64, multiple_of=64)           # of the decoder
    layers: int = Field(4, ge=1)
    vision_width: int = Field(128, ge=64, multiple_of=64)
    vision_layers: int = Field(4, ge=1)
    frames: tuple[int, ...] = Field((5, 6, 8), min_length=1)  # cycled over the joint steps
    vision_frames: int = Field(4, ge=1)
    captions: int = Field(2, ge=1, le=5)                     # references read per clip and step
    questions: int = Field(2, ge=0)                          # per clip and step
    contrastive_weight: float = Field(0.25, ge=0)
    dense_weight: float = Field(0.5, ge=0)
    name_weight: float = Field(0.5, ge=0)                    # visual tokens read as names
    motion_weight: float = Field(1.0, ge=0)                  # visual tokens tell what moved
    turn_weight: float = Field(1.0, ge=0)                    # the decoder counts the events so far
    text_weight: float = Field(0.3, ge=0)
    foreign_share: float = Field(0.5, ge=0, le=1)            # text-only sentences in es, de, fr or zh
    save_steps: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _shares_evenly(self) -> PretrainSettings:
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size: {self.batch_size} does not divide by processes ({self.processes})")
        return self


class ArmSettings(Settings):
    """One compared method; `learning_rate` is used where no swept rate is on file."""

    arm: Arm
    bits: Bits
    learning_rate: float = Field(ge=0)
    sweep: tuple[float, ...] = ()                            # learning rates to try on validation
    overrides: dict[str, Any] = {}                           # fields of RunSettings for this arm alone

    @model_validator(mode="after")
    def _arm_fits_bits(self) -> ArmSettings:
        return _check_arm(self)

    @property
    def name(self) -> str:
        return arm_name(self.arm, self.bits)


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
        chosen = {"experiment": experiment, "arm": arm.arm, "bits": arm.bits, "domain": domain, "seed": seed,
                  "learning_rate": rate, "steps": self.steps, "train_clips": self.train_clips, "base": base,
                  "eval_part": part, "eval_clips": clips}
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


class Profile(Settings):
    """A named set of settings for the whole chain of notebooks; a profile is a file."""

    name: str
    in_place: bool = False                                   # True: also writes figures/ and paper/generated/
    data: DataSettings
    base: PretrainSettings = PretrainSettings()
    main: MainSettings
    frames: FramesSettings
    workers: int = Field(2, ge=1)                            # runs at a time, one process each
    expected_s: dict[str, float] = {}                        # by notebook, until it was measured here

    @model_validator(mode="after")
    def _data_is_there(self) -> Profile:
        for domain in self.main.domains:
            if domain not in self.data.domains:
                raise ValueError(f"main.domains: {domain!r} is not in data.domains; allowed: "
                                 + ", ".join(self.data.domains))
            have = self.data.domains[domain]
            for run in self.main.runs() + self.main.sweep_runs():
                for key, part in (("train_clips", "train"), ("eval_clips", run.eval_part)):
                    if run.domain == domain and getattr(run, key) > getattr(have, part):
                        raise ValueError(f"main.{key}: {getattr(run, key)} is more than "
                                         f"data.domains.{domain}.{part} ({getattr(have, part)})")
        trained = (*self.frames.domains, *self.frames.per_policy_domains)
        for domain in (*trained, *self.frames.untrained):
            have = self.data.domains.get(domain, PartCounts())
            for key, part in (("train_clips", "train"), ("val_clips", "val"), ("test_clips", "test")):
                if (part != "train" or domain in trained) and getattr(self.frames, key) > getattr(have, part):
                    raise ValueError(f"frames.{key}: {getattr(self.frames, key)} is more than "
                                     f"data.domains.{domain}.{part} ({getattr(have, part)})")
        return self


def arm_name(arm: str, bits: str) -> str:
    """Name of an arm in tables and in results/lr.csv, e.g. `qlora-nf4`."""
    return f"{arm}-{bits}"


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


def load_run(path: str | Path) -> RunSettings:
    """Read one run's settings from YAML or JSON. Raises ConfigError."""
    return parse(RunSettings, read_mapping(path), path)


def swept_rates(path: str | Path) -> dict[str, float]:
    """Learning rate per arm name from a `lr.csv` with columns arm, bits, learning_rate; {} without one."""
    path = Path(path)
    if not path.is_file():
        return {}
    rates = {}
    with path.open(newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                rates[arm_name(row["arm"], row["bits"])] = float(row["learning_rate"])
            except (KeyError, TypeError, ValueError):
                raise ConfigError(f"{path}:{number}: {dict(row)} needs columns arm, bits and a number "
                                  "in learning_rate") from None
    return rates


def _check_arm(settings):
    allowed = _BITS_OF_ARM[settings.arm]
    if settings.bits not in allowed:
        raise ValueError(f"bits: {settings.bits!r} does not go with arm {settings.arm!r}; "
                         f"allowed: {', '.join(allowed)}")
    return settings
