"""The numbers of a plan: a model without values, and what its steps take."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vqlora.cost.build import build_shapes
from vqlora.cost.inputs import batch_bytes, clip_batch
from vqlora.cost.measure import static_bytes
from vqlora.cost.optimizers import optimizer_plan
from vqlora.cost.shapes import Shapes
from vqlora.cost.steps import Followed, follow_last_token, follow_prefill, follow_training

Inputs = Callable[[int, int], Mapping[str, Tensor]]  # (batch, frames) -> arguments of a forward


@dataclass(frozen=True)
class Settings:
    """What a plan is for; see `vqlora.plan_memory`."""

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


@dataclass
class Made:
    """The model of a plan, built again only when a setting that it depends on changes."""

    cls: type
    config: PreTrainedConfig
    shapes: Shapes = field(default_factory=Shapes)
    settings: Settings | None = None
    model: nn.Module | None = None
    checkpointed: bool = False

    def of(self, settings: Settings) -> nn.Module:
        # Switching checkpointing off leaves hooks behind that make inputs need gradients: build anew.
        if (
            self.settings is None
            or (self.checkpointed and not settings.gradient_checkpointing)
            or any(getattr(self.settings, name) != getattr(settings, name) for name in _OF_THE_MODEL)
        ):
            self.model = build_shapes(self.shapes, self.cls, copy.deepcopy(self.config), settings)
            self.checkpointed = False
        if settings.gradient_checkpointing and not self.checkpointed:
            self.checkpointed = True
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers' own names
                how = {"use_reentrant": False}
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        self.settings = settings
        return self.model


_OF_THE_MODEL = ("bits", "adapter", "full", "dtype", "double_quant", "quantize_head", "skip", "device")


def predict_training(made: Made, settings: Settings) -> tuple[dict[str, int], Followed]:
    """Bytes held throughout, and what a step adds at its peak."""
    model = made.of(settings)
    trained, batch = [p for p in model.parameters() if p.requires_grad], make_batch(model, settings)
    state, update = optimizer_plan(settings.optimizer, [p.shape for p in trained], settings.device)
    half = settings.full and settings.dtype == "bf16"
    have: list[Tensor] = []  # gradients; a parameter that the loss does not reach gets none

    def look() -> None:
        have.extend(p.grad for p in trained if p.grad is not None)

    how = {"shapes": made.shapes, "device": settings.device}
    step = follow_training(model.train(), batch, autocast=half, update=look, **how)
    gradients = sum(grad.numel() * grad.element_size() for grad in have)
    if step.peak_bytes < gradients + update:  # the optimizer's own step is the peak
        step = Followed({"gradients": gradients, "working": update}, step.flops)
    return {**static_parts(model, batch, settings.full), "optimizer": state}, step


def predict_generation(made: Made, settings: Settings) -> tuple[dict[str, int], Followed]:
    """Bytes held throughout, and what reading the prompt or giving the last token adds; FLOPs of a token."""
    model = made.of(settings)
    batch = make_batch(model, settings)
    how = {"shapes": made.shapes, "device": settings.device}
    steps = [follow_prefill(model.eval(), batch, settings.answer, **how)]
    if settings.answer > 1:
        steps.append(follow_last_token(model, batch, **how))
    most = max(steps, key=lambda step: step.peak_bytes)
    return static_parts(model, batch, settings.full), Followed(most.parts, steps[-1].flops)


def static_parts(model: nn.Module, batch: Mapping[str, Tensor], full: bool) -> dict[str, int]:
    """Bytes of the parts that are there before and after a step."""
    held = static_bytes(model)
    return {
        "weights": held["weights"] + held["buffers"] + (held["trainable"] if full else 0),
        "constants": held["constants"],
        "adapters": 0 if full else held["trainable"],
        "inputs": batch_bytes(batch),
    }


def make_batch(model: nn.Module, settings: Settings) -> Mapping[str, Tensor]:
    """The batch that `settings` stand for, for a model with or without adapters."""
    if settings.inputs is not None:
        return settings.inputs(settings.batch, settings.frames)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return clip_batch(model, settings.batch, settings.frames, settings.prompt, settings.answer,
                      settings.tokens_per_frame)  # fmt: skip
