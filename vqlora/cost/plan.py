"""What fine-tuning and generating would take, from a configuration alone: no weights, no values.

    plan = plan_memory("path-or-hub-id-or-config-or-model", bits="nf4", frames=8, batch=4)
    print(plan)                          # bytes by part, for training and for generation
    plan.fit("24GB")                     # the largest batch, and the most frames, that fit
    plan.advice("24GB")                  # what to change first when it does not fit

The model's own forward and backward run on shapes (`vqlora.cost.shapes`), and every storage is followed from
its making to its freeing (`vqlora.cost.follow`): nothing is fitted to measurements, and any class works.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig

from vqlora.cost.build import read_config
from vqlora.cost.measure import parameter_count
from vqlora.cost.optimizers import optimizer_plan
from vqlora.cost.predict import Inputs, Made, Settings, make_batch, predict_generation, predict_training
from vqlora.cost.search import largest
from vqlora.quantize import BITS

if TYPE_CHECKING:
    import pandas as pd

TRAINING = ("weights", "constants", "adapters", "optimizer", "inputs", "gradients", "activations", "logits",
            "working")  # fmt: skip
INFERENCE = ("weights", "constants", "adapters", "inputs", "cache", "logits", "working")


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes by part, at the moment when most is alive.

    training, inference: part -> bytes; the parts sum to `train_bytes` and `inference_bytes`. "constants" are
    the quantization's, "cache" the keys and values of generation, "working" what a layer needs while it
    computes. step_flops: of one training step; token_flops: of the last generated token, all rows together.
    """

    model: str
    settings: Settings
    training: Mapping[str, int]
    inference: Mapping[str, int]
    parameters: int
    trainable: int
    tokens: int  # of one row, frames included
    step_flops: int
    token_flops: int
    _made: Made | None = field(repr=False, compare=False, default=None)

    @property
    def train_bytes(self) -> int:
        return sum(self.training.values())

    @property
    def inference_bytes(self) -> int:
        return sum(self.inference.values())

    def replace(self, **changes) -> MemoryPlan:
        """The plan of the same model under other settings."""
        return _plan_settings(self._made, dataclasses.replace(self.settings, **changes))

    def fit(self, card: int | str, *, reserve: int | str = 0, generate: bool = False) -> dict[str, int]:
        """{"batch": .., "frames": ..}: the largest of each, the other as planned, that fits; 0 if none does.

        card: bytes of the card's memory, or "24GB". reserve: bytes of it that are not ours (the driver's
        context, the allocator's rounding). generate: for generation instead of training.
        Each size tried is a plan of its own, so this takes a few seconds for large models.
        """
        room = read_bytes(card) - read_bytes(reserve)

        def size(**changes) -> int:
            settings = dataclasses.replace(self.settings, **changes)
            predict = predict_generation if generate else predict_training
            static, moving = predict(self._made, settings)
            return sum(static.values()) + moving.peak_bytes

        return {
            "batch": largest(lambda n: size(batch=n), room),
            "frames": largest(lambda n: size(frames=n), room) if self.settings.frames else 0,
        }

    def advice(self, card: int | str | None = None, *, reserve: int | str = 0) -> pd.DataFrame:
        """What single changes would save in training, largest saving first.

        Returns:
            change, saves_bytes, train_bytes and, with a card, fits.
        """
        import pandas as pd

        rows = []
        for words, changes in _changes(self.settings):
            static, moving = predict_training(self._made, dataclasses.replace(self.settings, **changes))
            peak = sum(static.values()) + moving.peak_bytes
            rows.append((words, self.train_bytes - peak, peak))
        table = pd.DataFrame(rows, columns=["change", "saves_bytes", "train_bytes"])
        if card is not None:
            table["fits"] = table.train_bytes <= read_bytes(card) - read_bytes(reserve)
        table = table[table.saves_bytes > 0]
        return table.sort_values("saves_bytes", ascending=False, kind="stable").reset_index(drop=True)

    def table(self) -> pd.DataFrame:
        """Index: parts and "peak"; columns training and inference, in bytes."""
        import pandas as pd

        parts = list(dict.fromkeys((*TRAINING, *INFERENCE)))
        frame = pd.DataFrame({"training": self.training, "inference": self.inference}, index=parts)
        frame = frame.fillna(0).astype("int64")
        frame.loc["peak"] = [self.train_bytes, self.inference_bytes]
        return frame

    def to_dict(self) -> dict:
        """All numbers and settings, as JSON takes them."""
        settings = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        adapter = settings.pop("adapter")
        settings.pop("inputs")
        return {
            "model": self.model,
            "settings": {**settings, "skip": list(self.settings.skip), "rank": getattr(adapter, "r", None)},
            "training": dict(self.training),
            "inference": dict(self.inference),
            "train_bytes": self.train_bytes,
            "inference_bytes": self.inference_bytes,
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def __str__(self) -> str:
        table = (self.table() / 2**20).map("{:,.1f}".format)
        table.columns = ["training MiB", "inference MiB"]
        numbers = f"{self.parameters:,} parameters, {self.trainable:,} trained, {self.tokens} tokens a row"
        work = f"{self.step_flops:.3g} FLOPs a step, {self.token_flops:.3g} a generated token"
        return f"{self.model}, {self.settings.bits}: {numbers}, {work}\n{table.to_string()}"


_NUMBERS = ("parameters", "trainable", "tokens", "step_flops", "token_flops")


def plan_memory(
    model: str | Path | PreTrainedConfig | nn.Module,
    adapter_config: LoraConfig | None = None,
    *,
    bits: str = "nf4",
    frames: int = 8,
    tokens_per_frame: int | None = None,
    prompt: int = 32,
    answer: int = 32,
    batch: int = 1,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw_torch",
    dtype: str = "bf16",
    full: bool = False,
    double_quant: bool = True,
    quantize_head: bool = False,
    skip: tuple[str, ...] = (),
    device: str = "cuda",
    inputs: Inputs | None = None,
) -> MemoryPlan:
    """Predict the memory of fine-tuning and of generation; nothing is loaded.

    model: a folder, a hub id whose configuration is here, a configuration, or a model, of which only class
        and configuration are read.
    adapter_config: a `VQLoraConfig` with ranks, or any LoraConfig; None takes the library's default.
    bits, double_quant, quantize_head, skip: as in `vqlora.load_quantized`.
    frames, prompt, answer, batch: frames a clip, words before and behind, clips a batch. tokens_per_frame:
        for decoders without a vision tower.
    full: every parameter is trained in float32 (products in bf16 where dtype says so); no adapters, no bits.
    optimizer: the Trainer's name. dtype: what is computed in, "bf16" or "fp32".
    device: "cuda" or "cpu", for attention, optimizer and widths as they are there. Operations are those of
        the CPU in both cases: fused attention keeps as little on a card, int8 layers keep their inputs there.
    inputs: for classes that are not known: (batch, frames) -> arguments of one training forward.

    Raises ValueError that names the argument, its value and what is allowed.

    >>> from vqlora.base import tiny
    >>> plan = plan_memory(tiny()[0], frames=4, batch=2)
    >>> sum(plan.training.values()) == plan.train_bytes > plan.inference_bytes
    True
    """
    if bits not in BITS:
        raise ValueError(f"bits: {bits!r} is not known; allowed: {', '.join(BITS)}")
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"dtype: {dtype!r} is not known; allowed: bf16, fp32")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: {device!r} is not known; allowed: cuda, cpu")
    if full and adapter_config is not None:
        raise ValueError("full: True trains all parameters and takes no adapter_config")
    optimizer_plan(optimizer, [])
    settings = Settings(bits, adapter_config, full, frames, tokens_per_frame, prompt, answer, batch,
                        gradient_checkpointing, optimizer, dtype, double_quant, quantize_head, tuple(skip),
                        device, inputs)  # fmt: skip
    return _plan_settings(Made(*read_config(model)), settings)


def read_bytes(size: int | str) -> int:
    """Bytes of a number or of words such as "24GB" or "16 GiB" (both in powers of 1024, as cards are sold).

    Raises ValueError for other words.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?B)?\s*", size, re.I)
    if not found:
        raise ValueError(f"size: {size!r} cannot be read; allowed: bytes, or a number with MB, GB or TB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _plan_settings(made: Made, settings: Settings) -> MemoryPlan:
    training, step = predict_training(made, settings)
    inference, generation = predict_generation(made, settings)
    model = made.of(settings)
    return MemoryPlan(
        model=made.config.model_type,
        settings=settings,
        training=_parts(TRAINING, training, step.parts),
        inference=_parts(INFERENCE, inference, generation.parts),
        parameters=sum(parameter_count(p) for p in model.parameters() if p.requires_grad <= settings.full),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=make_batch(model, settings)["input_ids"].shape[1],
        step_flops=step.flops,
        token_flops=generation.flops,
        _made=made,
    )


def _parts(names: tuple[str, ...], static: Mapping[str, int], moving: Mapping[str, int]) -> dict[str, int]:
    return {name: static.get(name, 0) + moving.get(name, 0) for name in names}


def _changes(settings: Settings):
    """(words, changed settings) of what is usually tried first."""
    if not settings.gradient_checkpointing:
        yield "gradient checkpointing (about a third more time)", {"gradient_checkpointing": True}
    if settings.full:
        yield "adapters on an NF4 base instead of all parameters", {"full": False}
    elif settings.bits not in ("nf4", "fp4"):
        yield "the base in NF4", {"bits": "nf4"}
    elif not settings.double_quant:
        yield "double quantization of the constants", {"double_quant": True}
    if settings.dtype == "fp32":
        yield "computing in bf16", {"dtype": "bf16"}
    if settings.batch > 1:
        half = settings.batch // 2
        yield f"batch {half} with twice the accumulation steps", {"batch": half}
    if settings.frames > 1:
        yield f"{settings.frames // 2} frames a clip", {"frames": settings.frames // 2}
    if settings.optimizer in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"):
        yield "8-bit AdamW state (bitsandbytes)", {"optimizer": "adamw_8bit"}
    adapter = settings.adapter
    if not settings.full and adapter is not None and not adapter.rank_pattern and adapter.r > 1:
        halved = _with_rank(adapter, adapter.r // 2)
        if halved is not None:
            yield f"rank {adapter.r // 2}", {"adapter": halved}


def _with_rank(adapter: LoraConfig, rank: int) -> LoraConfig | None:
    if getattr(adapter, "ranks", None) is not None:
        return None
    other = copy.deepcopy(adapter)
    other.r = rank
    return other
