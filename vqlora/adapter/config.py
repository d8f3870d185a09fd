"""Settings of the gated low-rank update, saved with the adapter as any peft config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from peft import LoraConfig
from torch import nn

from vqlora.modalities import MODALITIES, Modalities, describe, linear_layers, match_names, target_modules
from vqlora.temporal import CONTROLS, GATES, PIXEL_FEATURES, SOUND_FEATURES, check_features

FEATURES = ("pixels", "scores")
ALLOCATORS = ("uniform", "ratio", "entropy", "motion", "gradient", "fisher", "relative", "quantization")


class VQLoraPeftType(StrEnum):
    """The method's own peft type: without `import vqlora`, peft does not know it and refuses to load."""

    VQLORA = "VQLORA"


@dataclass
class VQLoraConfig(LoraConfig):
    """y = W x + s · B (g(f_bt) ⊙ (A x)): low-rank adapters whose ranks open and close with the frame.

    gate: "none" (plain LoRA, bit for bit), "scalar" (one per frame), "rank" (one per rank and frame),
        "mixture" (two experts of half rank, weights 2σ(u) and 2σ(-u)) or "selective" (frames whose
        standardised `selective_feature` is under `selective_threshold` use the base alone).
    modalities: parts that get adapters, of vision, fusion, text, audio.
    gate_modalities: of these, the parts whose adapters have the gate; the others are plain. None: all.
    layers: "attention", "attention+mlp" or patterns of full names with `*`.
    ranks: a rank, or {modality, full name, path or pattern with `*`: rank}, of which later entries win and
        what is not named gets `r`; 0 means no adapter. A word ("gradient", "relative", several joined by "+")
        waits for `allocate_ranks`, which says what each means.
    budget: trainable parameters, gates counted, that `allocate_ranks` spends.
    rank_bounds: {modality: (least, greatest rank of a layer)} for `allocate_ranks`.
    rank_ratio: {modality: share} for ranks "ratio"; a modality that is not named gets rank 0.
    allocation: how `allocate_ranks` came to the ranks; it fills this in.
    features: "pixels" (from the frames the model gets) or "scores" (`frame_features` [B, T, n] of a forward).
    feature_names, feature_mean, feature_std: n names and the constants that standardise them;
        `calibrate_features` measures the constants.
    sound_mean, sound_std: the same for windows of sound, of which each name asks what it asks of frames.
    pixel_range: values of a black and a white pixel in the model's input; (-1.8, 2.1) with CLIP's constants.
    gate_hidden: width h of the trunk n -> h that the gates of one modality share.
    control: None, "constant" (the same gate for all frames, same parameters), "shuffled" (features permuted
        over the frames of each clip, anew in each training step) or "random" (fixed per frame number).

    LoraConfig's own fields (`r`, `lora_alpha`, `use_rslora`, `lora_dropout`, ...) keep their meaning;
    `target_modules` and `rank_pattern` are filled in by full names when the adapter is put on a model.
    Raises ValueError that names the field, its value and what is allowed.

    >>> VQLoraConfig(gate="rank", modalities=("vision", "text"), ranks={"vision": 4, "text": 16}).gate
    'rank'
    """

    gate: str = "rank"
    modalities: Sequence[str] = ("vision", "fusion", "text")
    gate_modalities: Sequence[str] | None = None
    layers: str | Sequence[str] = "attention+mlp"
    ranks: int | str | Mapping[str, int] | None = None
    budget: int | None = None
    rank_bounds: Mapping[str, Sequence[int]] | None = None
    rank_ratio: Mapping[str, float] | None = None
    allocation: Mapping[str, int | str] | None = None
    features: str = "pixels"
    feature_names: Sequence[str] = tuple(PIXEL_FEATURES)
    feature_mean: Sequence[float] | None = None
    feature_std: Sequence[float] | None = None
    sound_mean: Sequence[float] | None = None
    sound_std: Sequence[float] | None = None
    pixel_range: Sequence[float] = (-1.0, 1.0)
    gate_hidden: int = 4
    selective_feature: str = "motion"
    selective_threshold: float = 0.0
    control: str | None = None
    control_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = VQLoraPeftType.VQLORA
        one_of = {"gate": GATES, "features": FEATURES, "control": CONTROLS}
        for name, allowed in one_of.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not known; allowed: {', '.join(map(str, allowed))}"
                )
        self.modalities = [self.modalities] if isinstance(self.modalities, str) else list(self.modalities)
        for modality in self.modalities:
            if modality not in MODALITIES:
                raise ValueError(f"modalities: {modality!r} is not known; allowed: {', '.join(MODALITIES)}")
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"target_modules: {self.target_modules!r} would match endings of names on any tower; say "
                "which layers with modalities=(...) and layers=(...)"
            )
        self._check_ranks()
        self._check_features()
        self._check_gate()

    @property
    def reads_frames(self) -> bool:
        """Whether the gates differ from frame to frame."""
        return self.gate != "none" and self.control != "constant"

    def gates(self, modality: str) -> bool:
        """Whether the adapters of a part have a gate."""
        return self.gate != "none" and (self.gate_modalities is None or modality in self.gate_modalities)

    @property
    def feature_count(self) -> int:
        """n, the number of features of a frame."""
        return len(self.feature_names)

    def _check_ranks(self) -> None:
        if isinstance(self.ranks, str):
            allocator_parts(self.ranks)
            if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
                raise ValueError(
                    f"budget: {self.budget!r}; ranks {self.ranks!r} need a number of trainable parameters"
                )
            if "ratio" in self.ranks.split("+") and not any((self.rank_ratio or {}).values()):
                raise ValueError(f"rank_ratio: {self.rank_ratio!r}; ranks 'ratio' need {{modality: share}}")
        elif self.ranks is not None:
            for rank in self.ranks.values() if isinstance(self.ranks, Mapping) else [self.ranks]:
                if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                    raise ValueError(f"ranks: {rank!r} is not a rank; allowed: whole numbers from 0")
        for modality, share in (self.rank_ratio or {}).items():
            if not share >= 0:
                raise ValueError(f"rank_ratio: {share!r} of {modality!r} is below 0")
        for modality, bounds in (self.rank_bounds or {}).items():
            whole = len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)
            if not whole or not 0 <= bounds[0] <= bounds[1]:
                raise ValueError(f"rank_bounds: {bounds!r} of {modality!r}; allowed: (least, greatest) rank")

    def _check_features(self) -> None:
        self.feature_names = list(self.feature_names)
        if not self.feature_names:
            raise ValueError("feature_names: empty; a gate needs at least one feature")
        if self.features == "pixels":
            check_features(self.feature_names)
        tables = {"feature": PIXEL_FEATURES, "sound": SOUND_FEATURES}
        for name, place in ((f"{of}_{what}", n) for of in tables for n, what in enumerate(("mean", "std"))):
            values, table = getattr(self, name), tables[name.split("_")[0]]
            if values is None:  # a feature of another name is taken to come standardised
                values = [table.get(feature, (0.0, 1.0))[place] for feature in self.feature_names]
            values = [float(value) for value in values]
            if len(values) != self.feature_count:
                raise ValueError(f"{name}: {len(values)} values for {self.feature_count} feature_names")
            setattr(self, name, values)
        for key in ("feature_std", "sound_std"):
            for name, std in zip(self.feature_names, getattr(self, key), strict=True):
                if not std > 0:
                    raise ValueError(f"{key}: {std} of {name!r} is not above 0")
        self.pixel_range = [float(value) for value in self.pixel_range]
        if len(self.pixel_range) != 2 or not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError(f"pixel_range: {self.pixel_range}; expected (black, white) with black < white")

    def _check_gate(self) -> None:
        if self.gate_hidden < 1:
            raise ValueError(f"gate_hidden: {self.gate_hidden}; allowed: whole numbers from 1")
        if self.gate_modalities is not None:
            parts = self.gate_modalities
            self.gate_modalities = [parts] if isinstance(parts, str) else list(parts)
            if self.gate == "none":
                raise ValueError(f"gate_modalities: {parts!r} need a gate; allowed with gate 'none': None")
            if not self.gate_modalities or not set(self.gate_modalities) <= set(self.modalities):
                raise ValueError(f"gate_modalities: {parts!r}; allowed: some of {', '.join(self.modalities)}")
        if self.control is not None and self.gate == "none":
            raise ValueError(f"control: {self.control!r} needs a gate; allowed with gate 'none': None")
        if self.gate == "selective":
            if self.control == "constant":
                raise ValueError("control: 'constant' leaves gate 'selective' no frame to tell from another")
            if self.selective_feature not in self.feature_names:
                raise ValueError(
                    f"selective_feature: {self.selective_feature!r} is not among feature_names "
                    f"({', '.join(self.feature_names)})"
                )
        for name in [f.name for f in fields(self) if f.metadata.get("is_lora_variant")] + ["lora_bias"]:
            if getattr(self, name):
                raise ValueError(f"{name}: {getattr(self, name)!r} cannot be combined with VQLoraConfig")
        if self.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights!r} changes the base or is a method of its own; "
                "allowed: True, False, 'gaussian', 'orthogonal'"
            )


def allocator_parts(word: str) -> tuple[str, ...]:
    """The allocators that `word` joins by "+". Raises ValueError for an unknown one."""
    parts = tuple(word.split("+"))
    for part in parts:
        if part not in ALLOCATORS:
            raise ValueError(
                f"ranks: {part!r} is no allocator; allowed: {', '.join(ALLOCATORS)}, or several joined by '+'"
            )
    return parts


def resolve_layers(model: nn.Module, config: VQLoraConfig) -> None:
    """Fill in `target_modules` and `rank_pattern` by full names, in place; check those that came filled in.

    Raises ValueError for ranks nobody has allocated yet, layers the model lacks (another base), and layers
    outside `config.modalities`.
    """
    if isinstance(config.ranks, str):
        raise ValueError(
            f"ranks: {config.ranks!r} is not resolved into numbers yet; call "
            "config = vqlora.allocate_ranks(model, config, batches) first"
        )
    known = describe(model)
    if config.target_modules is not None:
        config.target_modules = _check_names(model, known, config)
        return
    if config.rank_pattern:
        raise ValueError(f"rank_pattern: {config.rank_pattern!r}; give ranks={{name: rank}} instead")
    names = target_modules(model, config.modalities, config.layers)
    ranks = layer_ranks(names, known, config)
    used = {name: rank for name, rank in ranks.items() if rank}
    if not used:
        raise ValueError(f"ranks: {config.ranks!r} gives every layer rank 0")
    config.r = Counter(used.values()).most_common(1)[0][0]
    # peft reads the keys as regular expressions of endings; anchored, each is one layer
    config.rank_pattern = {f"^{re.escape(n)}": rank for n, rank in used.items() if rank != config.r}
    # A tuple: peft would shorten a long list to endings, which can match more on another model.
    config.target_modules = tuple(used)


def layer_ranks(names: Sequence[str], known: Modalities, config: VQLoraConfig) -> dict[str, int]:
    """The rank of each layer as `config.ranks` says; ValueError for an entry that matches nothing."""
    if not isinstance(config.ranks, Mapping):
        return dict.fromkeys(names, config.r if config.ranks is None else config.ranks)
    ranks = dict.fromkeys(names, config.r)
    for key, rank in config.ranks.items():
        if key in MODALITIES:
            hits = [name for name in names if known.of(name) == key]
            if not hits:
                raise ValueError(f"ranks: {key!r} has no layer here; modalities are {config.modalities}")
        elif key in ranks:
            hits = [key]
        else:
            hits = match_names(names, [key], "ranks")
        ranks.update(dict.fromkeys(hits, rank))
    return ranks


def _check_names(model: nn.Module, known: Modalities, config: VQLoraConfig) -> tuple[str, ...]:
    have, wanted = [name for name, _ in linear_layers(model)], set(config.target_modules)
    missing = sorted(wanted - set(have))
    if missing:
        raise ValueError(
            f"target_modules: {known.model_type} has no linear layer {missing[0]!r} "
            f"({len(missing)} of {len(wanted)} missing): these adapters belong to another base"
        )
    for name in sorted(wanted):
        if known.of(name) not in config.modalities:
            raise ValueError(
                f"target_modules: {name!r} is {known.of(name)} and modalities are {config.modalities}"
            )
    return tuple(name for name in have if name in wanted)
