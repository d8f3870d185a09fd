"""Typed settings of whole experiments, i.e. which runs a notebook asks for; a profile holds one of each.

    profile = load_profile("cpu")                 # configs/cpu.yaml
    runs = profile.main.runs()                    # tuple of RunSettings
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from vqlora.config import DataSettings, PartCounts, PretrainSettings, RunSettings, Settings
from vqlora.experiments.compared import (
    ArmSettings,
    BitsSettings,
    MainSettings,
    RankSettings,
    TemporalSettings,
)
from vqlora.experiments.confirm import ConfirmPart, PairClaim
from vqlora.experiments.cost import STEP_ARMS, CostModel, CostSettings
from vqlora.experiments.frames import JUDGED, FramesSettings
from vqlora.experiments.general import GeneralSettings
from vqlora.experiments.hub import AlignSettings, HubSettings
from vqlora.experiments.qualitative import QualitativeSettings
from vqlora.experiments.scaling import BaseSize, PlacementSettings, ScalingSettings
from vqlora.experiments.sound import ListenSettings, SoundClaim, SoundSettings
from vqlora.settings_file import ConfigError, nearest, parse, read_mapping

__all__ = ["JUDGED", "STEP_ARMS", "AlignSettings", "ArmSettings", "BaseSize", "BitsSettings", "ConfirmPart",
           "CostModel", "CostSettings", "FramesSettings", "GeneralSettings", "HubSettings", "ListenSettings",
           "MainSettings", "PairClaim", "PlacementSettings", "Profile", "QualitativeSettings",
           "RankSettings", "ScalingSettings", "SoundClaim", "SoundSettings", "TemporalSettings",
           "load_profile", "reads"]

# Parts of a profile that a notebook reads beside its name; all of them where nothing is said.
_RUNS = ("data", "base")                                     # of those that train
READS = {"01_data": {"data"}, "02_base": {*_RUNS, "stock"}, "03_main": {*_RUNS, "main", "methods"},
         "04_cost": {"cost"}, "05_temporal": {*_RUNS, "temporal"}, "06_ranks": {*_RUNS, "ranks"},
         "07_frames": {*_RUNS, "frames"}, "08_bits": {*_RUNS, "bits"},
         "09_rank_size_and_placement": {*_RUNS, "placement"},
         "10_scaling": {*_RUNS, "bits", "placement", "scaling"}, "11_generalization": {*_RUNS, "general"},
         "12_qualitative": {*_RUNS, "main", "qualitative"}, "13_architectures": {"classes"},
         "14_checkpoints": {"data", "hub", "card"}, "15_confirmation": {*_RUNS, "confirm"},
         "16_sound": {*_RUNS, "sound"}}


def reads(notebook: str) -> set[str]:
    """Names of the parts of a profile that a notebook's results depend on."""
    return READS.get(notebook, {*_RUNS, "main"})


class Profile(Settings):
    """A named set of settings for the whole chain of notebooks; a profile is a file."""

    name: str
    in_place: bool = False                                   # True: also writes figures/ and paper/generated/
    data: DataSettings | None = None                         # what is rendered
    base: PretrainSettings = PretrainSettings()
    stock: PretrainSettings | None = None                    # its rival, trained by notebook 02
    main: MainSettings | None = None
    methods: MainSettings | None = None                      # of notebook 03, beside main
    frames: FramesSettings | None = None                     # of notebook 07
    temporal: TemporalSettings | None = None                 # of notebook 05
    ranks: RankSettings | None = None                        # of notebook 06; each arm an allocator
    cost: CostSettings | None = None                         # of notebook 04
    bits: BitsSettings | None = None                         # of notebook 08
    placement: PlacementSettings | None = None               # of notebook 09
    scaling: ScalingSettings | None = None                   # of notebook 10
    classes: tuple[str, ...] = ()                            # that 13 tries, of vqlora.zoo; empty: all
    general: GeneralSettings | None = None                   # of notebook 11
    qualitative: QualitativeSettings | None = None           # of notebook 12
    hub: tuple[HubSettings, ...] = ()                        # of notebook 14
    confirm: tuple[ConfirmPart, ...] = ()                    # of notebook 15
    sound: SoundSettings | None = None                       # of notebook 16
    card: str | None = None                                  # that its runs shall fit, e.g. 24GB
    workers: int = Field(2, ge=1)                            # runs at a time, one process each
    cluster: str | None = None                               # address of a Ray cluster that makes the runs
    at_once: int = Field(1, ge=1)                            # notebooks; times they measure then mean little
    expected_s: dict[str, float] = {}                        # by notebook, until it was measured here

    @model_validator(mode="after")
    def _data_is_there(self) -> Profile:
        names = ("main", "methods", "temporal", "ranks", "bits", "placement", "sound")
        parts = [(name, getattr(self, name)) for name in names]
        for label, part in parts + [(f"hub[{n}]", part) for n, part in enumerate(self.hub)] + [
                (f"confirm[{n}]", part) for n, part in enumerate(self.confirm)]:
            if part is not None:
                self._check_domains(label, part)
        twice = sorted({name for part in self.hub for name in part.domains
                        if sum(name in other.domains for other in self.hub) > 1})
        if twice:
            raise ValueError(f"hub: domain {twice[0]!r} is in two comparisons; their results would be mixed")
        if (count := sum(part.primary_count for part in self.confirm)) > 6:
            raise ValueError(f"confirm: {count} primary comparisons; allowed: at most 6, "
                             "each claim on each domain")
        if self.card is not None:
            for part in self.hub:
                part.on(self.card)
        if self.bits is not None:
            self._check_bits()
        if self.sound is not None and self.data is not None and not self.data.audio:
            raise ValueError("sound: data.audio is false, so that no clip has a sound; allowed: true")
        if self.general is not None:
            self._check_runs("general", self.general.runs() + self.general.sweep_runs())
        if self.qualitative is not None:
            self._check_runs("qualitative", [self.qualitative.run("")])
        if self.frames is not None:
            self._check_frames()
        if self.scaling is not None:
            if self.placement is None or self.bits is None:
                raise ValueError("scaling: needs the sections placement and bits, whose runs it takes up")
            self.scaling.clip_runs(self.placement)          # building them checks clips and arm
        return self

    def read_by(self, notebook: str, *, also: Iterable[str] = ()) -> dict[str, Any]:
        """What of this profile a notebook's results depend on, less what is as it is by default."""
        return self.model_dump(mode="json", include=reads(notebook) | set(also), exclude_defaults=True)

    def _check_bits(self) -> None:
        wanted, have = self.bits.source_clips + self.bits.calibration_clips, self._rendered().get("source")
        if have is None or wanted > have.val:
            raise ValueError(f"bits.source_clips: with calibration_clips {wanted}, more than "
                             f"data.domains.source.val ({have.val if have else 0})")

    def _check_runs(self, label: str, runs: Iterable[RunSettings]) -> None:
        for run in runs:
            for domain in (run.domain, *run.also_domains):
                have = self._rendered().get(domain, PartCounts())
                wanted = [(run.eval_part, "eval_clips", run.eval_clips)]
                wanted += [("train", "train_clips", run.train_clips)] if domain == run.domain else []
                for part, key, count in wanted:
                    if count > getattr(have, part):
                        raise ValueError(f"{label}.{key}: {count} is more than "
                                         f"data.domains.{domain}.{part} ({getattr(have, part)})")

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
