"""Which frame each activation row shows: from the inputs of one forward to an index for every layer's rows.

    rows = frame_rows(model, batch)                       # FrameRows, or None without a video
    rows.index("frames", x.shape)                         # [F, 1]: x [F, N, D] in the vision tower
    rows.index("tokens", x.shape)                         # [B, L]: x [B, L, D] in the decoder
    frame_pixels(model, batch)                            # [F, 3, H, W], in the same order

Glossary: F frames in all clips together, in row order; W windows of sound, likewise; B clips; L tokens.
Values 0..F-1 name a frame, F + b a row of clip b that shows none, F + B + w a window of sound where a model's
windows are told apart (else its sound is rows of clips). Where one placeholder stands for several real frames
(Qwen joins two), such a group is one frame here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from vqlora.modalities import LAYOUTS, describe


@dataclass(frozen=True)
class FrameRows:
    """Which frame each activation row shows, for one forward.

    clip: [F] clip of each frame, ascending; a clip may have no frame.
    clips: B, the number of clips.
    tokens: [R, L] placeholder map of the text rows, values as `index` gives them; None if they show no frame.
    row_clip: [R] clip of each text row (arange(B) unless several rows of text share a clip).
    lengths: rows of each frame [F] in "flat" inputs, one entry for each stage (before and after merging).
    sound: rows of each clip [B] in "sound" inputs, one entry for each stage.
    heard: [W] clip of each window of sound, ascending; None where a model's windows are not told apart.
    """

    clip: LongTensor
    clips: int
    tokens: LongTensor | None = None
    row_clip: LongTensor | None = None
    lengths: tuple[LongTensor, ...] = ()
    sound: tuple[LongTensor, ...] = ()
    heard: LongTensor | None = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def frames(self) -> int:
        """F, the number of frames in all clips together."""
        return len(self.clip)

    def index(self, layout: str, shape: torch.Size) -> LongTensor:
        """Frame of each row of a layer input of `shape`, as `shape[:-1]` or broadcastable to it.

        Values: 0..F-1 a frame, F + b a row of clip b that shows none, F + B + w a window of sound. In cached
        generation a "tokens" input that is shorter than the prompt is all text; in beam search rows repeat
        clip by clip.
        Raises ValueError, naming layout and shape, where they do not fit this forward's frames.
        """
        key = (layout, tuple(shape[:-1]))
        if key not in self._cache:
            if layout not in LAYOUTS:
                raise ValueError(f"layout {layout!r} is not known; allowed: {', '.join(LAYOUTS)}")
            self._cache[key] = getattr(self, "_" + layout)(tuple(shape))
        return self._cache[key]

    def _frames(self, shape) -> LongTensor:
        if shape[0] != self.frames:
            raise self._misfit("frames", shape, f"{self.frames} rows, one per frame")
        return torch.arange(self.frames, device=self.clip.device).view(-1, *[1] * (len(shape) - 2))

    def _flat(self, shape) -> LongTensor:
        return self._neighbours("flat", shape, self.lengths)

    def _sound(self, shape) -> LongTensor:
        rows = torch.Size(shape[:-1]).numel()
        if self.heard is not None:
            if rows != len(self.heard):
                raise self._misfit("sound", shape, f"{len(self.heard)} rows, one per window")
            windows = torch.arange(rows, device=self.heard.device)
            return (self.frames + self.clips + windows).view(shape[:-1])
        # in beam search the audio tower gets every recording as often as there are beams, side by side
        repeats = {int(rows // lengths.sum()) for lengths in self.sound if rows % lengths.sum() == 0}
        stages = (*self.sound, *(lengths * n for n in sorted(repeats) for lengths in self.sound))
        return self.frames + self._neighbours("sound", shape, stages)

    def _neighbours(self, layout, shape, stages) -> LongTensor:
        """Number of each run of rows, where the runs are as long as one of the stages says."""
        rows = torch.Size(shape[:-1]).numel()
        for lengths in stages:
            if int(lengths.sum()) == rows:
                runs = torch.arange(len(lengths), device=lengths.device)
                return runs.repeat_interleave(lengths).view(shape[:-1])
        wanted = " or ".join(str(int(lengths.sum())) for lengths in stages)
        raise self._misfit(layout, shape, f"{wanted} rows" if stages else "no such input in this forward")

    def _clips(self, shape) -> LongTensor:
        shown = torch.unique_consecutive(self.clip)
        if shape[0] != len(shown):
            raise self._misfit("clips", shape, f"{len(shown)} rows, one per clip with frames")
        return (self.frames + shown).view(-1, *[1] * (len(shape) - 2))

    def _tokens(self, shape) -> LongTensor:
        if self.tokens is None:
            return self._text(shape)
        rows, length = self.tokens.shape
        if shape[0] % rows or len(shape) < 3 or shape[1] > length:
            raise self._misfit("tokens", shape, f"a multiple of {rows} rows of at most {length} tokens")
        if shape[1] < length:
            return self._text(shape)
        return self.tokens.repeat_interleave(shape[0] // rows, dim=0)

    def _cross(self, shape) -> LongTensor:
        counts = torch.unique_consecutive(self.clip, return_counts=True)[1]
        clips, per_clip = len(counts), int(counts[0])
        if bool((counts != per_clip).any()) or shape[0] % clips or shape[1] % per_clip:
            wanted = f"a multiple of {clips} rows, each a multiple of {per_clip} frames"
            raise self._misfit("cross", shape, wanted)
        index = torch.arange(self.frames, device=self.clip.device).view(clips, per_clip)
        index = index.repeat_interleave(shape[1] // per_clip, dim=1)
        index = index.repeat_interleave(shape[0] // clips, dim=0)
        return index.view(*index.shape, *[1] * (len(shape) - 3))

    def _text(self, shape) -> LongTensor:
        owner = self.row_clip
        if owner is None:
            owner = torch.arange(self.clips, device=self.clip.device)
        if shape[0] % len(owner):
            raise self._misfit("text", shape, f"a multiple of {len(owner)} rows")
        owner = owner.repeat_interleave(shape[0] // len(owner))
        return (self.frames + owner).view(-1, *[1] * (len(shape) - 2))

    def _misfit(self, layout, shape, wanted) -> ValueError:
        return ValueError(
            f"rows of layout {layout!r} and shape {tuple(shape)} do not fit {self.frames} frames in "
            f"{self.clips} clips: expected {wanted}"
        )


class FrameSource:
    """Finds the frames in an architecture's inputs; one instance per description."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> FrameRows | None:
        raise NotImplementedError

    def pixels(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The frames [F, 3, H, W] in row order, as the model gets them (standardised)."""
        raise NotImplementedError

    def windows(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The windows of sound [W, bands] in row order, where `heard` says which there are."""
        raise NotImplementedError

    def keep_black(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict:
        """Inputs from which the model drops no real frame; most architectures drop none."""
        return dict(inputs)


def frame_rows(model: nn.Module, inputs: Mapping[str, Any]) -> FrameRows | None:
    """Which frame each row shows in a forward with the keyword arguments `inputs`; None without a video.

    None as well where the inputs bring encoded frames (`mm_encoder_outputs`) instead of pixels: `generate`
    runs the vision tower before the first forward. The rows of generate's own arguments hold for all of them.

    Raises KeyError for an architecture that is not described, ValueError where placeholders and frames do not
    fit.
    """
    return _source(model)(model, inputs)


def frame_pixels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The frames [F, 3, H, W] of a forward, float, in `frame_rows`' order, as standardised for the model.

    Where the class takes flattened patches they are put together again and brought to 64 x 64 pixels, each
    clip by itself; where it joins neighbouring frames, their mean is given.
    """
    return _source(model).pixels(model, inputs).float()


def sound_windows(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The windows of sound [W, bands] of a forward, float, in the order of `FrameRows.heard`."""
    return _source(model).windows(model, inputs).float()


def keep_black_frames(model: nn.Module, inputs: Mapping[str, Any]) -> dict:
    """The same inputs, for models that drop all-zero frames as padding: a real one gets one pixel of 6e-5.

    Real are as many frames as the placeholders ask for; padding stays zero and is still dropped.
    """
    return _source(model).keep_black(model, inputs)


def _source(model: nn.Module) -> FrameSource:
    known = describe(model)
    if known.rows is None:
        raise KeyError(
            f"model type {known.model_type!r}: its description does not say where the frames are; describe "
            "it again with rows=, for example vqlora.modalities.sources.Clips(arg='pixel_values', "
            "token='image_token_id') for clips [B, T, 3, H, W]"
        )
    return known.rows
