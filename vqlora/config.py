"""Typed settings of a run, of the data and of the base, read from YAML or JSON.

Those of whole experiments, and the profiles, are in `vqlora.experiments`.

A settings object is a value: frozen, comparable, written out in full by `model_dump`. Files are read
strictly (text is never taken for a number) and each fault is one line, `file: key: value, what is allowed`.

    settings = load_run("my_run.yaml")
"""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vqlora.settings_file import ConfigError, parse, read_mapping

__all__ = ["ConfigError", "DataSettings", "DataSource", "PartCounts", "PretrainSettings", "RunSettings",
           "arm_name", "load_run", "swept_rates"]

Arm = Literal["frozen", "full", "lora", "qlora", "vqlora", "adalora", "eva", "dora", "houlsby", "prefix",
              "posttrain"]
Bits = Literal["nf4", "fp4", "int8", "bf16"]
Part = Literal["train", "val", "devtest", "test"]
Language = Literal["en", "es", "de", "fr", "zh"]
Modality = Literal["vision", "fusion", "text", "audio"]

_BITS_OF_ARM = {"frozen": ("nf4", "fp4", "int8", "bf16"), "full": ("bf16",), "lora": ("bf16",),
                "qlora": ("nf4", "fp4", "int8"), "vqlora": ("nf4", "fp4", "int8", "bf16"),
                "adalora": ("nf4", "fp4", "bf16"), "eva": ("nf4", "fp4", "int8", "bf16"),
                "dora": ("nf4", "fp4", "bf16"), "houlsby": ("nf4", "fp4", "int8", "bf16"),
                "prefix": ("nf4", "fp4", "int8", "bf16"), "posttrain": ("nf4", "fp4", "int8")}
# Settings that an arm could only pass over: they must be left as they are.
_LACKS = {"houlsby": ("layers", "dropout", "rslora"),
          "prefix": ("layers", "dropout", "rslora", "gradient_checkpointing")}


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSource(Settings):
    """Videos and captions that the project did not render, as `vqlora.data.sources` reads them."""

    format: Literal["msrvtt", "vatex", "activitynet", "lsmdc", "jsonl"]
    root: str                                                # folder, relative to the settings file's
    protocol: str = "official"                               # of splits: `vqlora data check --help`
    eval_protocol: str | None = None                         # where evaluation follows another one
    task: Literal["paragraph", "segments"] = "paragraph"     # of activitynet
    size: int | None = Field(None, ge=8)                     # of square frames, in pixels; None: the base's
    fps: float | None = Field(None, gt=0)                    # frames to keep of a second; None: all


class RunSettings(Settings):
    """One fine-tuning run. `experiment` and `label` are names, no part of its identity (see `store.run_key`).
    """

    experiment: str
    label: str | None = None                                 # of the method, where the arm does not say it
    arm: Arm
    bits: Bits
    domain: str                                              # a rendered data set; or a name, with `data`
    data: DataSource | None = None
    seed: int = Field(ge=0)
    rank: int = Field(8, ge=1)                               # of houlsby the width, of prefix the positions
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    modalities: tuple[Modality, ...] = Field(("vision", "fusion", "text"), min_length=1)
    layers: str | tuple[str, ...] = "attention+mlp"          # or "attention", or patterns of module names
    gate: Literal["none", "scalar", "rank", "mixture", "selective"] = "rank"  # of vqlora, as the next three
    gate_modalities: tuple[Modality, ...] | None = None      # parts whose adapters have it; None: all
    control: Literal["constant", "shuffled", "random"] | None = None
    gate_rate: float = Field(5.0, gt=0)                      # times learning_rate
    gate_features: Literal["pixels", "scores"] = "pixels"    # or of all frames, as `select` sees them
    ranks: str | dict[str, int] | None = None                # of arm vqlora: an allocator's name, or ranks
    rank_ratio: dict[Modality, float] | None = None          # of ranks "ratio"
    budget: int | None = Field(None, ge=1)                   # trainable parameters, as a word in `ranks` asks
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
    sound: Literal["own", "other"] | None = None             # beside the frames; other: of another clip
    judge: tuple[str, ...] = ()                              # policies to evaluate instead of `select`
    judge_frames: tuple[int, ...] = ()                       # with as many frames each
    judge_clips: int = Field(0, ge=0)                        # also of validation, to choose a policy by
    languages: tuple[Language, ...] = ()                     # of the captions to learn; empty: English
    also_domains: tuple[str, ...] = ()                       # to evaluate on, beside `domain`
    also_frames: tuple[int, ...] = ()                        # to evaluate with, beside `frames`
    also_languages: tuple[Language, ...] = ()                # to evaluate captions in, beside those learned
    train_clips: int = Field(ge=1)
    eval_clips: int = Field(ge=1)
    eval_part: Literal["val", "devtest", "test"] = "val"
    base: str = "released"                                   # or a checkpoint: folder or hub id
    prompt: str | None = Field(None, min_length=1)           # asks for a caption; of a checkpoint
    save_to: str | None = None                               # folder for the trained model
    report_to: tuple[str, ...] = ()                          # beside TensorBoard, as the Trainer names them
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    optimizer: str = "auto"

    @model_validator(mode="after")
    def _arm_fits_bits(self) -> RunSettings:
        if bool(self.judge) != bool(self.judge_frames):
            raise ValueError("judge: needs judge_frames, and judge_frames needs it")
        if self.generalizes and self.judge:
            raise ValueError(f"judge: {self.judge} does not go with languages or also_*; allowed: []")
        if self.also_domains and self.data is not None:
            raise ValueError("also_domains: are rendered ones and do not go with data; allowed: []")
        for key in ("train_frames", "judge_frames", "also_frames"):
            if min(getattr(self, key), default=1) < 1:
                raise ValueError(f"{key}: {min(getattr(self, key))} frames; at least 1 is allowed")
        if self.ranks is not None and self.arm != "vqlora":
            raise ValueError(f"ranks: {self.ranks!r} does not go with arm {self.arm!r}; allowed: vqlora")
        if self.gate_modalities is not None:
            free = set(self.modalities if self.arm == "vqlora" and self.gate != "none" else ())
            if not self.gate_modalities or not set(self.gate_modalities) <= free:
                allowed = ", ".join(p for p in self.modalities if p in free) or "None, without a gate"
                raise ValueError(f"gate_modalities: {', '.join(self.gate_modalities)!r}; allowed: {allowed}")
        for key in _LACKS.get(self.arm, ()):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {getattr(self, key)!r} does not go with arm {self.arm!r}; "
                                 f"allowed: {type(self).model_fields[key].default!r}")
        if self.sound is not None and (self.judge or self.generalizes):
            raise ValueError(f"sound: {self.sound!r} does not go with judge, languages or also_*; "
                             "allowed: None")
        if "audio" in self.modalities and self.sound is None:
            raise ValueError("modalities: 'audio' needs sound, own or other; allowed: vision, fusion, text")
        if self.budget is None and (isinstance(self.ranks, str) or self.arm in ("adalora", "eva")):
            raise ValueError(f"budget: missing; arm {self.arm!r} with ranks {self.ranks!r} spends one")
        return check_arm(self)

    @property
    def generalizes(self) -> bool:
        """Whether captions in other languages, or further evaluations, are asked for (`vqlora.general`)."""
        return bool(self.languages or self.also_domains or self.also_frames or self.also_languages)

    @property
    def method(self) -> str:
        """What tables call it: the label, else the arm."""
        return self.label or self.arm

    @property
    def name(self) -> str:
        """Short name for progress lines and messages, e.g. `03_main/language/qlora-nf4/seed1`."""
        return f"{self.experiment}/{self.domain}/{arm_name(self.method, self.bits)}/seed{self.seed}"


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
    architecture: Literal["kinevlm", "smolvlm"] = "kinevlm"  # smolvlm: the stock class, see stock_base
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


def arm_name(arm: str, bits: str) -> str:
    """Name of an arm in tables and in results/lr.csv, e.g. `qlora-nf4`."""
    return f"{arm}-{bits}"


def load_run(path: str | Path) -> RunSettings:
    """Read one run's settings from YAML or JSON. Raises ConfigError.

    With `data`, the domain is called by its format unless it is given. Relative paths of data, base and
    `save_to` are taken from the file's folder; a base that is no folder there is left as it is.
    """
    values = read_mapping(path)
    if isinstance(values.get("data"), dict) and isinstance(values["data"].get("format"), str):
        values = {"domain": values["data"]["format"], **values}
    settings, found = parse(RunSettings, values, path), {}
    here = Path(path).parent
    base = here / Path(settings.base).expanduser()
    if settings.base != "released" and base.is_dir():
        found["base"] = str(base.resolve())
    if settings.save_to is not None:
        found["save_to"] = str((here / Path(settings.save_to).expanduser()).resolve())
    if settings.data is not None:
        root = (here / Path(settings.data.root).expanduser()).resolve()
        found["data"] = settings.data.model_copy(update={"root": str(root)})
    return settings.model_copy(update=found)


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


def check_arm(settings):
    allowed = _BITS_OF_ARM[settings.arm]
    if settings.bits not in allowed:
        raise ValueError(f"bits: {settings.bits!r} does not go with arm {settings.arm!r}; "
                         f"allowed: {', '.join(allowed)}")
    return settings
