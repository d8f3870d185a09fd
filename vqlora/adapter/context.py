"""What the adapted layers of one model share: which frames the current forward shows.

peft passes a layer nothing but its input. So the base model's forward is watched: a hook before it notes the
frames, and the layers look them up. Three things keep the note with the forward it belongs to: a checkpointed
block computes again under its own forward's frames; a key/value cache carries the features of its rows from
the prompt to the tokens behind it; and a layer that is called outside a forward raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vqlora.adapter.frames import Frames, _length
from vqlora.cache_rows import HELD
from vqlora.modalities import describe
from vqlora.modalities.rows import frame_rows, keep_black_frames

if TYPE_CHECKING:
    from vqlora.adapter.config import VQLoraConfig

_ON_MODEL = "_vqlora_context"


class FrameContext:
    """One per base model, shared by its layers and adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, VQLoraConfig] = {}
        self.trunks: dict[tuple[str, str], nn.Linear] = {}  # (adapter, modality) -> what its gates share
        self.groups: dict[tuple[str, str, str], list] = {}  # (adapter, modality, layout) -> its gated layers
        self.gates: dict | None = None  # what they looked up together in this forward; None: each by itself
        self.frames: Frames | None = None
        self.scores: Tensor | None = None  # what `frame_features` gives to all forwards inside it
        self._inside = False
        self._generation: Frames | None = None
        self._blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )
        if hasattr(model, "generate"):
            model.generate = _Generate(model, self)
        setattr(model, _ON_MODEL, self)

    @staticmethod
    def of(model: nn.Module, create: bool = False) -> FrameContext:
        """The context of a model, wrapped by peft or not. Raises ValueError where there is none."""
        for module in model.modules():
            if _ON_MODEL in vars(module):
                return vars(module)[_ON_MODEL]
        if not create:
            raise ValueError(f"{type(model).__name__} has no VQLoRA adapter; see peft.get_peft_model")
        return FrameContext(model)

    def current(self, layer: str) -> Frames:
        """The frames that the layer's input shows now. Raises RuntimeError outside a forward."""
        # A checkpoint that somebody else made recomputes in backward: the last forward's frames are meant.
        if self.frames is None or not (self._inside or torch._C._current_graph_task_id() != -1):
            raise RuntimeError(
                f"{layer}: called outside the model's forward, so its frames are unknown; call the model "
                "itself, or use `with vqlora.watch(model, **inputs):` around calls of its parts"
            )
        return self.frames

    def resume(self, frames: Frames | None, function, *args):
        """Call `function` under the frames of the forward that it belongs to."""
        held = self.frames, self._inside
        self.frames, self._inside = frames, True
        try:
            return function(*args)
        finally:
            self.frames, self._inside = held

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            made = getattr(block, "_gradient_checkpointing_func", None)
            if isinstance(made, _Recompute):
                block._gradient_checkpointing_func = made.checkpoint
        vars(model).pop("generate", None)
        delattr(model, _ON_MODEL)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Note the frames of a forward with `inputs`; returns the inputs to go on with."""
        inputs = dict(inputs)
        scores = inputs.pop("frame_features", None)
        if describe(model).rows is not None and inputs.get("input_ids") is not None:
            inputs = keep_black_frames(model, inputs)
        self._inside, self.frames, self.gates = True, self._generation, {}
        if model.training and any(block.gradient_checkpointing for block in self._blocks):
            self._wrap_checkpoints()
            self.gates = None  # a block that is computed again must make its gates itself
        if not any(config.reads_frames for config in self.configs.values()):
            return inputs
        if self._generation is not None and frame_rows(model, inputs) is None:
            self.frames.offset = _length(inputs.get("past_key_values"))
            return inputs
        seed = 0
        if model.training and any(config.control == "shuffled" for config in self.configs.values()):
            seed = int(torch.randint(2**31, ()))  # of torch's own state, which a resumed run restores
        self.frames = Frames(model, inputs, self.scores if scores is None else scores, seed)
        return inputs

    def end(self, cache: Any = None) -> None:
        """The forward is over: its cache takes the features of its rows along."""
        frames, self._inside, self.gates = self.frames, self._generation is not None, None
        if frames is None:
            return
        kept = frames.row_features()
        if cache is not None and kept:
            setattr(cache, HELD, kept)
        if frames is not self._generation:
            frames.close()

    @contextmanager
    def generating(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """All inside belongs to one prompt: encoders, which run before the first forward, and each step."""
        scores, before = inputs.get("frame_features"), self.scores
        self.scores = before if scores is None else scores
        inputs = self.begin(model, inputs)
        self._generation = self.frames
        try:
            yield inputs
        finally:
            self.frames, self._generation = self._generation, None
            self.scores = before
            self.end()

    def _before(self, model, args, kwargs):
        return (), self.begin(model, {**dict(zip(_arguments(type(model)), args, strict=False)), **kwargs})

    def _after(self, model, args, kwargs, output):
        cache = kwargs.get("past_key_values")
        self.end(getattr(output, "past_key_values", None) if cache is None else cache)

    def _wrap_checkpoints(self) -> None:
        for block in self._blocks:
            made = getattr(block, "_gradient_checkpointing_func", None)
            if block.gradient_checkpointing and made is not None and not isinstance(made, _Recompute):
                block._gradient_checkpointing_func = _Recompute(made, self, block)


class _Recompute:
    """A block's checkpoint function, such that what it computes again sees the same frames as before.

    A reentrant checkpoint also loses every gradient when none of the block's inputs asks for one, as behind
    pixels and a frozen stem; then the first input is made to.
    """

    def __init__(self, checkpoint, context: FrameContext, block: nn.Module) -> None:
        self.checkpoint, self.context, self.block = checkpoint, context, block

    def __call__(self, function, *args, **kwargs):
        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant") is not False
        if reentrant and torch.is_grad_enabled() and args and not any(_asks(x) for x in args):
            if isinstance(args[0], Tensor) and any(p.requires_grad for p in self.block.parameters()):
                args = (args[0].detach().requires_grad_(), *args[1:])
        function = partial(self.context.resume, self.context.frames, function)
        return self.checkpoint(function, *args, **kwargs)


class _Generate:
    """A model's `generate`: it encodes frames before its first forward, and takes `frame_features` too."""

    def __init__(self, model: nn.Module, context: FrameContext) -> None:
        self.model, self.context = model, context

    def __call__(self, *args, **kwargs):
        if args:
            kwargs = {"inputs": args[0], **kwargs}
        inputs = {self.model.main_input_name if k == "inputs" else k: v for k, v in kwargs.items()}
        with self.context.generating(self.model, inputs) as inputs:
            return type(self.model).generate(self.model, *args[1:], **inputs)


@contextmanager
def frame_features(model: nn.Module, features: Tensor) -> Iterator[None]:
    """All forwards inside use the features [B, T, n], as with the keyword `frame_features` of a forward.

    For calls that refuse keywords they do not know. Beams and several answers per prompt are allowed:
    `with vqlora.frame_features(model, f): model.generate(**inputs, num_beams=4)`
    """
    context = FrameContext.of(model)
    before, context.scores = context.scores, features
    try:
        yield
    finally:
        context.scores = before


@contextmanager
def watch(model: nn.Module, **inputs: Any) -> Iterator[None]:
    """Calls of parts of the model inside (its vision tower, say) see the frames of `inputs`.

    inputs: what the model's own forward would get, `frame_features` included.
    """
    context = FrameContext.of(model)
    context.begin(model.get_base_model() if hasattr(model, "get_base_model") else model, inputs)
    try:
        yield
    finally:
        context.end()


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls.forward).parameters if name != "self"]


def _asks(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
