"""Which frame each activation row shows: from the inputs of one forward to an index for every layer's rows.

    rows = frame_rows(model, batch)                       # FrameRows, or None without a video
    rows.index("frames", x.shape)                         # [F, 1]: x [F, N, D] in the vision tower
    rows.index("tokens", x.shape)                         # [B, L]: x [B, L, D] in the decoder
    frame_pixels(model, batch)                            # [F, 3, H, W], in the same order

Glossary: F frames in all clips together, in row order; B clips; L tokens. Values 0..F-1 name a frame, F + b a
row of clip b that shows none. Where one placeholder stands for several real frames (Qwen joins two), such a
group is one frame here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from vqlora.modalities import LAYOUTS, describe

# No 16-bit type rounds it to zero, so that towers which drop all-zero frames keep a frame with it.
NUDGE = 2.0**-14


@dataclass(frozen=True)
class FrameRows:
    """Which frame each activation row shows, for one forward.

    clip: [F] clip of each frame, ascending; a clip may have no frame.
    clips: B, the number of clips.
    tokens: [R, L] placeholder map of the text rows, values as `index` gives them; None if they show no frame.
    row_clip: [R] clip of each text row (arange(B) unless several rows of text share a clip).
    lengths: [F] rows of each frame in "flat" inputs, before any merging.
    """

    clip: LongTensor
    clips: int
    tokens: LongTensor | None = None
    row_clip: LongTensor | None = None
    lengths: LongTensor | None = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def frames(self) -> int:
        """F, the number of frames in all clips together."""
        return len(self.clip)

    def index(self, layout: str, shape: torch.Size) -> LongTensor:
        """Frame of each row of a layer input of `shape`, as `shape[:-1]` or broadcastable to it.

        Values: 0..F-1 a frame, F + b a row of clip b that shows none. In cached generation a "tokens" input
        that is shorter than the prompt is all text; in beam search rows repeat clip by clip.
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
        if self.lengths is None:
            raise self._misfit("flat", shape, "no flat input: this forward's frames have no lengths")
        rows, total = torch.Size(shape[:-1]).numel(), int(self.lengths.sum())
        merge = total // rows if rows else 0  # a merger joins this many neighbours into one row
        if not merge or merge * rows != total or bool((self.lengths % merge).any()):
            raise self._misfit("flat", shape, f"{total} rows or a whole fraction of them")
        index = torch.arange(self.frames, device=self.clip.device)
        return index.repeat_interleave(self.lengths // merge).view(shape[:-1])

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
        counts = torch.bincount(self.clip, minlength=self.clips)
        per_clip = int(counts.max())
        if bool((counts != per_clip).any()) or shape[0] % self.clips or shape[1] % per_clip:
            wanted = f"a multiple of {self.clips} rows, each a multiple of {per_clip} frames"
            raise self._misfit("cross", shape, wanted)
        index = torch.arange(self.frames, device=self.clip.device).view(self.clips, per_clip)
        index = index.repeat_interleave(shape[1] // per_clip, dim=1)
        index = index.repeat_interleave(shape[0] // self.clips, dim=0)
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

    def keep_black(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict:
        """Inputs from which the model drops no real frame; most architectures drop none."""
        return dict(inputs)


@dataclass(frozen=True)
class Clips(FrameSource):
    """Clips of equally many frames, [V, T, 3, H, W] in the argument `arg`.

    token: name of the configuration entry with the placeholder's id; None if text shows no frame.
    newline: placeholders at the end of each clip that show no frame.
    shared: rows of text come in groups that share one clip (KineVLM), else clips follow the placeholders, and
        a row of text may have several or none.
    """

    arg: str = "pixel_values"
    token: str | None = "image_token_id"
    newline: int = 0
    shared: bool = False

    def __call__(self, model, inputs):
        pixels = inputs.get(self.arg)
        if pixels is None:
            return None
        videos, frames = pixels.shape[:2]
        clip = torch.arange(videos, device=pixels.device).repeat_interleave(frames)
        if self.token is None:
            return FrameRows(clip, videos)
        placed = placeholders(model, inputs, self.token)
        rows = placed.shape[0]
        if self.shared and rows % videos:
            raise ValueError(f"{rows} rows of text cannot share {videos} clips evenly")
        counts = placed.sum(dim=1)
        each = int(counts.sum()) // (rows if self.shared else videos)  # placeholders of one video
        if each == 0 or bool((counts % each).any()) or (each - self.newline) % frames:
            raise ValueError(
                f"input_ids hold {counts.tolist()} placeholders ({self.token}) per row, which {videos} clips "
                f"of {frames} frames cannot fill evenly"
            )
        per_frame = (each - self.newline) // frames
        owner = torch.arange(videos * frames, device=pixels.device).view(videos, frames)
        owner = owner.repeat_interleave(per_frame, dim=1)
        if self.shared:
            row_clip = torch.arange(videos, device=pixels.device).repeat_interleave(rows // videos)
            tokens = token_map(placed, owner[row_clip].flatten(), row_clip, videos * frames)
            return FrameRows(clip, videos, tokens, row_clip)
        row_clip = torch.arange(rows, device=pixels.device)
        video_row = row_clip.repeat_interleave(counts // each)
        shown_by_none = (videos * frames + video_row)[:, None].expand(-1, self.newline)
        tokens = token_map(placed, torch.cat([owner, shown_by_none], 1).flatten(), row_clip, videos * frames)
        return FrameRows(video_row.repeat_interleave(frames), rows, tokens, row_clip)

    def pixels(self, model, inputs):
        return inputs[self.arg].flatten(0, 1)


@dataclass(frozen=True)
class PaddedImages(FrameSource):
    """[B, N, 3, H, W] padded with all-zero images, which the model drops (Idefics2 and 3, SmolVLM).

    per_frame: from (model, H, W) to the placeholders of one frame. The placeholders decide how many frames
    of a row are real, so that a real all-zero frame is told from padding.
    """

    per_frame: Any
    token: str = "image_token_id"

    def __call__(self, model, inputs):
        if inputs.get("pixel_values") is None:
            return None
        real, placed = self._real(model, inputs)
        clip = real.nonzero()[:, 0]
        frames = torch.arange(len(clip), device=clip.device)
        rows = torch.arange(placed.shape[0], device=clip.device)
        each = int(placed.sum()) // max(len(clip), 1)
        # a batch of text alone still sends one empty image through the tower: no token shows it
        tokens = token_map(placed, frames.repeat_interleave(each), rows, len(clip))
        return FrameRows(clip, placed.shape[0], tokens, rows)

    def pixels(self, model, inputs):
        return inputs["pixel_values"][self._real(model, inputs)[0]]

    def keep_black(self, model, inputs):
        if inputs.get("pixel_values") is None:
            return dict(inputs)
        real, placed = self._real(model, inputs)
        pixels = inputs["pixel_values"]
        black = real & ~(pixels != 0).flatten(2).any(-1)
        if not bool(black.any()) or not bool(placed.any()):
            return dict(inputs)
        pixels = pixels.clone()
        pixels[..., 0, 0, 0] = torch.where(black, pixels.new_tensor(NUDGE), pixels[..., 0, 0, 0])
        return {**inputs, "pixel_values": pixels}

    def _real(self, model, inputs) -> tuple[Tensor, Tensor]:
        """(real [B, N]: which images the model shall see, placed [B, L])."""
        pixels, placed = inputs["pixel_values"], placeholders(model, inputs, self.token)
        each = self.per_frame(model, *pixels.shape[-2:])
        wanted, some = placed.sum(dim=1), (pixels != 0).flatten(2).any(-1)
        count = wanted // each
        # a row with enough images that show something needs no black one; else its first are the real ones
        first = torch.arange(pixels.shape[1], device=pixels.device) < count[:, None]
        real = torch.where((some.sum(dim=1) == count)[:, None], some, first)
        if bool((wanted % each).any()) or bool((some & ~real).any()) or bool((real.sum(1) != count).any()):
            raise ValueError(
                f"input_ids hold {wanted.tolist()} placeholders per row, {each} to a frame, but pixel_values "
                f"{some.sum(dim=1).tolist()} images that are not all zero, of {pixels.shape[1]}"
            )
        if not bool(real.any()):
            real[0, 0] = True
        return real, placed


def frame_rows(model: nn.Module, inputs: Mapping[str, Any]) -> FrameRows | None:
    """Which frame each row shows in a forward with the keyword arguments `inputs`; None without a video.

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


def keep_black_frames(model: nn.Module, inputs: Mapping[str, Any]) -> dict:
    """The same inputs, for models that drop all-zero frames as padding: a real one gets one pixel of 6e-5.

    Real are as many frames as the placeholders ask for; padding stays zero and is still dropped.
    """
    return _source(model).keep_black(model, inputs)


def placeholders(model: nn.Module, inputs: Mapping[str, Any], token: str) -> Tensor:
    """[R, L] bool: where input_ids hold the placeholder. ValueError without input_ids."""
    if inputs.get("input_ids") is None:
        raise ValueError("input_ids are needed to find the frames among the tokens; inputs_embeds hide them")
    return inputs["input_ids"] == getattr(model.config, token)


def token_map(placed: Tensor, owner: Tensor, row_clip: Tensor, frames: int) -> LongTensor:
    """[R, L]: `owner` (one value per placeholder, row by row) at the placeholders, F + clip elsewhere."""
    if int(placed.sum()) != len(owner):
        raise ValueError(f"{int(placed.sum())} placeholders in input_ids, but the frames fill {len(owner)}")
    tokens = (frames + row_clip)[:, None].repeat(1, placed.shape[1])
    tokens[placed] = owner
    return tokens


def _source(model: nn.Module) -> FrameSource:
    known = describe(model)
    if known.rows is None:
        raise KeyError(
            f"model type {known.model_type!r}: its description does not say where the frames are; describe "
            "it again with rows=, for example vqlora.rows.Clips(arg='pixel_values', token='image_token_id') "
            "for clips [B, T, 3, H, W]"
        )
    return known.rows
