"""What the adapted layers of one model share: which frames the current forward shows, and their features.

peft passes a layer nothing but its input. So the base model's forward is watched: a hook before it notes the
frames (`Frames`), the layers look them up, and three things keep the note with the forward it belongs to:
a checkpointed block recomputes under its own forward's frames, a key/value cache carries the features of its
rows from the prompt to the tokens generated behind it, and a layer called outside a forward is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import LongTensor, Tensor, nn

from vqlora.adapter.features import raw_features
from vqlora.modalities import describe
from vqlora.rows import FrameRows, frame_rows, keep_black_frames
from vqlora.temporal import random_features, shuffled, standardise, with_clip_means

if TYPE_CHECKING:
    from vqlora.adapter.config import VQLoraConfig

_ON_MODEL = "_vqlora_frames"  # where a base model keeps its context, a cache the features of its rows


class Frames:
    """The frames of one forward; computed when a layer first asks, so that disabled adapters cost nothing."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        scores: Tensor | None,
        held: dict[str, Tensor] | None,
        shuffle_seed: int,
    ) -> None:
        self.rows: FrameRows | None = None
        self._model, self._inputs, self._scores = model, inputs, scores
        self._held, self._shuffle_seed = held, shuffle_seed
        self._opened = False
        self._raw: dict[tuple, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    def features(self, adapter: str, config: VQLoraConfig) -> Tensor:
        """[F + B, n] standardised features of the frames and, as their means, of the clips.

        Without a video in the forward: one row per row of the cache it goes on from, else a single row of
        zeros, the average clip.
        """
        if adapter not in self._features:
            with torch.no_grad():
                self._features[adapter] = self._compute(adapter, config)
        return self._features[adapter]

    def index(self, layout: str, shape: torch.Size) -> LongTensor:
        """Rows of `features` for a layer input of `shape`: broadcastable to shape[:-1]."""
        self._open()
        if self.rows is not None:
            return self.rows.index(layout, shape)
        rows = 1 if self._held is None else len(next(iter(self._held.values())))
        if self._held is not None and shape[0] % rows:
            raise ValueError(
                f"a key/value cache of {rows} rows is gone on from with {shape[0]}; after taking rows out of "
                "a cache, call vqlora.adapter.take_rows(cache, rows) instead of its own method"
            )
        index = torch.arange(rows).repeat_interleave(1 if self._held is None else shape[0] // rows)
        return index.view(-1, *[1] * (len(shape) - 2))

    def row_features(self) -> dict[str, Tensor]:
        """[R, n] for each adapter that was used: what the rows of text behind this forward go on with."""
        if self.rows is None:
            return dict(self._held or {})
        owner = self.rows.row_clip
        if owner is None:
            owner = torch.arange(self.rows.clips)
        return {name: f[self.rows.frames + owner.to(f.device)] for name, f in self._features.items()}

    def close(self) -> None:
        """Let go of the batch once the forward is over; what was computed stays for the backward pass."""
        self._model = self._inputs = self._scores = None

    def _open(self) -> None:
        if self._opened:
            return
        if self._inputs is None:
            raise RuntimeError(
                "these adapters were off during the forward that is now recomputed or looked at; switch "
                "adapters before a forward, not between it and its backward"
            )
        self.rows, self._opened = frame_rows(self._model, self._inputs), True
        cache = self._inputs.get("past_key_values")
        if self.rows is not None:
            self._held = None
        elif self._held is None and _length(cache):
            raise RuntimeError(
                "the frames behind this key/value cache are unknown: it was not filled by this model with "
                "its adapters on, or was put together by hand; see vqlora.adapter.take_rows and join_rows"
            )

    def _compute(self, adapter: str, config: VQLoraConfig) -> Tensor:
        self._open()
        if self.rows is None and self._held is None:
            return torch.zeros(1, config.feature_count)
        if self.rows is None:
            if adapter not in self._held:
                raise RuntimeError(f"adapter {adapter!r} was not active when this cache was filled")
            return self._held[adapter]
        if config.control == "random":
            found = random_features(self.rows.clip, config.feature_count, config.control_seed)
        else:
            key = (config.features, *config.feature_names, *config.pixel_range)
            if key not in self._raw:  # several adapters often read the same features
                self._raw[key] = raw_features(self._model, self._inputs, self._scores, self.rows, config)
            found = standardise(self._raw[key], config.feature_mean, config.feature_std)
        if config.control == "shuffled":
            found = shuffled(found, self.rows.clip, config.control_seed + self._shuffle_seed)
        return with_clip_means(found, self.rows.clip, self.rows.clips)


class FrameContext:
    """One per base model, shared by its layers and adapters; see the module's docstring."""

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, VQLoraConfig] = {}
        self.trunks: dict[tuple[str, str], nn.Linear] = {}  # (adapter, modality) -> what its gates share
        self.frames: Frames | None = None
        self.scores: Tensor | None = None  # what `frame_features` gives to all forwards inside it
        self._inside = False
        self._blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )
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
        delattr(model, _ON_MODEL)

    def begin(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Note the frames of a forward with `inputs`; returns the inputs to go on with."""
        inputs = dict(inputs)
        scores = inputs.pop("frame_features", None)
        if describe(model).rows is not None and inputs.get("input_ids") is not None:
            inputs = keep_black_frames(model, inputs)
        self.frames = None
        if any(config.reads_frames for config in self.configs.values()):
            seed = 0
            if model.training and any(c.control == "shuffled" for c in self.configs.values()):
                seed = int(torch.randint(2**31, ()))  # of torch's own state, which a resumed run restores
            held = getattr(inputs.get("past_key_values"), _ON_MODEL, None)
            scores = self.scores if scores is None else scores
            self.frames = Frames(model, inputs, scores, held, seed)
        self._inside = True
        if model.training:
            self._wrap_checkpoints()
        return inputs

    def end(self, cache: Any) -> None:
        """The forward is over: its cache takes the features of its rows along."""
        self._inside = False
        if self.frames is None:
            return
        kept = self.frames.row_features()
        if cache is not None and kept:
            setattr(cache, _ON_MODEL, kept)
        self.frames.close()

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


@contextmanager
def frame_features(model: nn.Module, features: Tensor) -> Iterator[None]:
    """All forwards inside use the features [B, T, n], as with the keyword `frame_features` of a forward.

    For `generate`, which refuses keywords it does not know. Beams and several answers per prompt are allowed:
    `with vqlora.frame_features(model, f): model.generate(..., num_beams=4)`
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
        context.end(None)


def take_rows(cache: Any, rows: Sequence[int]) -> None:
    """Keep these rows of a key/value cache, in this order, in place, with what is known of their frames."""
    index = torch.tensor(list(rows), device=cache.layers[0].keys.device)
    cache.batch_select_indices(index)
    held = getattr(cache, _ON_MODEL, None)
    if held is not None:
        setattr(cache, _ON_MODEL, {name: f[index.to(f.device)] for name, f in held.items()})


def join_rows(caches: Sequence[Any], into: Any) -> None:
    """`into` holds the rows of all caches one after the other: it takes what is known of their frames."""
    held = [getattr(cache, _ON_MODEL, None) for cache in caches]
    if all(held):
        setattr(into, _ON_MODEL, {name: torch.cat([h[name] for h in held]) for name in held[0]})


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls.forward).parameters if name != "self"]


def _asks(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache or ())
