"""What fine-tuning and generating would take, from a configuration alone: no weights, no values.

    plan = plan_memory("path-or-hub-id-or-config-or-model", bits="nf4", frames=8, batch=4)
    print(plan)                          # bytes by part, for training and for generation
    plan.fit("24GB")                     # the largest batch, and the most frames, that fit
    plan.advice("24GB")                  # what to change first when it does not fit

The model's own forward and backward run on shapes (`vqlora.cost.shapes`), and every storage is followed from
its making to its freeing (`vqlora.cost.follow`): nothing is fitted to measurements, and any class works.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vqlora.cost.build import build_shapes, read_config
from vqlora.cost.inputs import batch_bytes, clip_batch
from vqlora.cost.measure import parameter_count, static_bytes
from vqlora.cost.optimizers import optimizer_plan
from vqlora.cost.search import largest
from vqlora.cost.shapes import Shapes
from vqlora.cost.steps import follow_last_token, follow_prefill, follow_training
from vqlora.quantize import BITS

if TYPE_CHECKING:
    import pandas as pd

TRAINING = ("weights", "constants", "adapters", "optimizer", "inputs", "gradients", "activations", "logits",
            "working")  # fmt: skip
INFERENCE = ("weights", "constants", "adapters", "inputs", "cache", "logits", "working")
Inputs = Callable[[int, int], Mapping[str, Tensor]]  # (batch, frames) -> arguments of a forward


@dataclass(frozen=True)
class Settings:
    """What a plan is for; see `plan_memory`."""

    bits: str = "nf4"
    adapter: LoraConfig | None = None
    full: bool = False
    frames: int = 8
    tokens_per_frame: int | None = None
    prompt: int = 32
    answer: int = 32
    batch: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch"
    dtype: str = "bf16"
    double_quant: bool = True
    quantize_head: bool = False
    skip: tuple[str, ...] = ()
    device: str = "cuda"
    inputs: Inputs | None = field(default=None, repr=False)


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
    source: tuple = field(repr=False, compare=False, default=())

    @property
    def train_bytes(self) -> int:
        return sum(self.training.values())

    @property
    def inference_bytes(self) -> int:
        return sum(self.inference.values())

    def replace(self, **changes) -> MemoryPlan:
        """The plan of the same model under other settings."""
        return _plan_settings(*self.source, dataclasses.replace(self.settings, **changes))

    def fit(self, card: int | str, *, reserve: int | str = 0, generate: bool = False) -> dict[str, int]:
        """{"batch": .., "frames": ..}: the largest of each, the other as planned, that fits; 0 if none does.

        card: bytes of the card's memory, or "24GB". reserve: bytes of it that are not ours (the driver's
        context, the allocator's rounding). generate: for generation instead of training.
        Each size tried is a plan of its own, so this takes a few seconds for large models.
        """
        room = read_bytes(card) - read_bytes(reserve)

        def size(**changes) -> int:
            plan = self.replace(**changes)
            return plan.inference_bytes if generate else plan.train_bytes

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
            plan = self.replace(**changes)
            rows.append((words, self.train_bytes - plan.train_bytes, plan.train_bytes))
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
    device: "cuda" or "cpu", for attention, optimizer and widths as they are there.
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
    return _plan_settings(*read_config(model), settings)


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


def _plan_settings(cls: type, config: PreTrainedConfig, settings: Settings) -> MemoryPlan:
    import copy

    shapes = Shapes()
    model = build_shapes(shapes, cls, copy.deepcopy(config), settings)
    batch = make_batch(model, settings)
    held = static_bytes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    state, update = optimizer_plan(settings.optimizer, [p.shape for p in trained], settings.device)
    static = {
        "weights": held["weights"] + held["buffers"] + (held["trainable"] if settings.full else 0),
        "constants": held["constants"],
        "adapters": 0 if settings.full else held["trainable"],
        "inputs": batch_bytes(batch),
    }
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with shapes:
        step = follow_training(model.train(), batch, autocast=settings.full and settings.dtype == "bf16")
        generations = [follow_prefill(model.eval(), batch, settings.answer)]
        if settings.answer > 1:
            generations.append(follow_last_token(model, batch, settings.answer))
    gradients = sum(p.numel() * p.element_size() for p in trained)
    training = step.parts
    if step.peak_bytes < gradients + update:  # the optimizer's own step is the peak
        training = {"gradients": gradients, "working": update}
    most = max(generations, key=lambda found: found.peak_bytes)
    return MemoryPlan(
        model=config.model_type,
        settings=settings,
        training=_parts(TRAINING, {**static, "optimizer": state}, training),
        inference=_parts(INFERENCE, static, most.parts),
        parameters=sum(parameter_count(p) for p in model.parameters() if p.requires_grad <= settings.full),
        trainable=sum(p.numel() for p in trained),
        tokens=batch["input_ids"].shape[1],
        step_flops=step.flops,
        token_flops=generations[-1].flops,
        source=(cls, config),
    )


def make_batch(model: nn.Module, settings: Settings) -> Mapping[str, Tensor]:
    """The batch that `settings` stand for, for a model with or without adapters."""
    if settings.inputs is not None:
        return settings.inputs(settings.batch, settings.frames)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return clip_batch(model, settings.batch, settings.frames, settings.prompt, settings.answer,
                      settings.tokens_per_frame)  # fmt: skip


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
    import copy

    other = copy.deepcopy(adapter)
    other.r = rank
    return other
