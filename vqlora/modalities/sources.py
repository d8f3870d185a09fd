"""Where each family of architectures has its frames: from a forward's inputs to `FrameRows` and to pixels.

    Clips("pixel_values", "image_token_id")       # [B, T, 3, H, W], equally many frames in each clip
    PaddedImages(per_frame)                       # [B, N, 3, H, W], padded with zeros that the model drops
    SeparateFrames()                              # [F, 3, H, W]
    PackedPatches()                               # [patches, pixels] with a grid (t, h, w) per video
    PairedTexts()                                 # clips beside texts that belong to no clip (dual encoders)

V is the number of videos in the inputs, R of text rows, F of frames; see `vqlora.modalities.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from vqlora.modalities.rows import FrameRows, FrameSource

# No 16-bit type rounds it to zero, so that towers which drop all-zero frames keep a frame with it.
NUDGE = 2.0**-14
PIXELS = 64  # side of the frames that are put together from patches


@dataclass(frozen=True)
class Clips(FrameSource):
    """Clips of equally many frames, [V, T, 3, H, W] in the argument `arg`.

    token: name of the configuration entry with the placeholder's id; None if text shows no frame.
    newline: placeholders at the end of each clip that show no frame.
    shared: rows of text come in groups that share one clip (KineVLM), else clips follow the placeholders, and
        a row of text may have several or none.
    sound: the argument with windows of sound [V, S, bands], whose placeholders follow those of the frames;
        with `shared` alone.
    """

    arg: str = "pixel_values"
    token: str | None = "image_token_id"
    newline: int = 0
    shared: bool = False
    sound: str | None = None

    def __call__(self, model, inputs):
        pixels = inputs.get(self.arg)
        if pixels is None:
            return None
        if self.arg != "pixel_values":
            refuse_images(inputs)
        videos, frames = pixels.shape[:2]
        clip = torch.arange(videos, device=pixels.device).repeat_interleave(frames)
        if self.token is None:
            return FrameRows(clip, videos)
        sound = inputs.get(self.sound) if self.sound else None
        windows = 0 if sound is None else sound.shape[1]
        placed = placeholders(model, inputs, self.token)
        rows = placed.shape[0]
        if self.shared and rows % videos:
            raise ValueError(f"{rows} rows of text cannot share {videos} clips evenly")
        counts = placed.sum(dim=1)
        each = int(counts.sum()) // (rows if self.shared else videos)  # placeholders of one video
        if each == 0 or bool((counts % each).any()) or (each - self.newline - windows) % frames:
            raise ValueError(
                f"input_ids hold {counts.tolist()} placeholders ({self.token}) per row, which {videos} clips "
                f"of {frames} frames{f' and {windows} of sound' if windows else ''} cannot fill evenly"
            )
        per_frame = (each - self.newline - windows) // frames
        owner = torch.arange(videos * frames, device=pixels.device).view(videos, frames)
        owner = owner.repeat_interleave(per_frame, dim=1)
        if self.shared:
            row_clip = torch.arange(videos, device=pixels.device).repeat_interleave(rows // videos)
            heard = None
            if windows:  # numbered behind the frames and the clips
                heard = torch.arange(videos, device=pixels.device).repeat_interleave(windows)
                numbers = torch.arange(videos * windows, device=pixels.device).view(videos, windows)
                owner = torch.cat([owner, videos * (frames + 1) + numbers], dim=1)
            tokens = token_map(placed, owner[row_clip].flatten(), row_clip, videos * frames)
            return FrameRows(clip, videos, tokens, row_clip, heard=heard)
        row_clip = torch.arange(rows, device=pixels.device)
        video_row = row_clip.repeat_interleave(counts // each)
        shown_by_none = (videos * frames + video_row)[:, None].expand(-1, self.newline)
        tokens = token_map(placed, torch.cat([owner, shown_by_none], 1).flatten(), row_clip, videos * frames)
        return FrameRows(video_row.repeat_interleave(frames), rows, tokens, row_clip)

    def pixels(self, model, inputs):
        return inputs[self.arg].flatten(0, 1)

    def windows(self, model, inputs):
        return inputs[self.sound].flatten(0, 1)


@dataclass(frozen=True)
class PaddedImages(FrameSource):
    """[B, N, 3, H, W] padded with all-zero images, which the model drops (Idefics2 and 3, SmolVLM).

    per_frame: from (model, H, W) to the placeholders of one frame. The placeholders decide how many frames
    of a row are real, so that a real all-zero frame is told from padding.
    """

    per_frame: Callable[[nn.Module, int, int], int]
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


@dataclass(frozen=True)
class SeparateFrames(FrameSource):
    """Frames [F, 3, H, W], clip by clip; a text row has as many as its placeholders say (InternVL)."""

    arg: str = "pixel_values"
    token: str = "image_token_id"

    def __call__(self, model, inputs):
        pixels = inputs.get(self.arg)
        if pixels is None:
            return None
        placed, count = placeholders(model, inputs, self.token), len(pixels)
        counts = placed.sum(dim=1)
        each = int(counts.sum()) // count
        if each == 0 or bool((counts % each).any()) or each * count != int(counts.sum()):
            raise ValueError(
                f"input_ids hold {counts.tolist()} placeholders ({self.token}) per row, which {count} frames "
                "cannot fill evenly"
            )
        rows = torch.arange(len(placed), device=pixels.device)
        owner = torch.arange(count, device=pixels.device).repeat_interleave(each)
        tokens = token_map(placed, owner, rows, count)
        return FrameRows(rows.repeat_interleave(counts // each), len(placed), tokens, rows)

    def pixels(self, model, inputs):
        return inputs[self.arg]


@dataclass(frozen=True)
class PackedPatches(FrameSource):
    """All patches of all videos in one tensor, with a grid (t, h, w) per video (Qwen-VL, VideoLLaMA3).

    A frame here is one step of t, which may join `temporal_patch_size` real frames. Neighbouring patches,
    `merge` x `merge`, lie together and become one token.

    sound: from (model, inputs) to rows of each clip in the audio tower, by stage.
    """

    arg: str = "pixel_values_videos"
    grid: str = "video_grid_thw"
    token: str = "video_token_id"
    merges: str | None = None
    sound: Callable[[nn.Module, Mapping[str, Any]], tuple[LongTensor, ...]] | None = None

    def __call__(self, model, inputs):
        if inputs.get(self.arg) is None:
            return None
        refuse_images(inputs)
        placed, (t, h, w), merge = placeholders(model, inputs, self.token), *self._grid(model, inputs)
        video = torch.arange(len(t), device=t.device).repeat_interleave(t)  # [F]
        full, merged = (h * w)[video], (h * w // merge**2)[video]
        owner = torch.arange(len(video), device=t.device).repeat_interleave(merged)
        if inputs.get("video_compression_mask") is not None:  # VideoLLaMA3 drops tokens that hardly change
            owner = owner[inputs["video_compression_mask"].to(owner.device)]
        rows = torch.arange(len(placed), device=t.device)
        tokens = token_map(placed, owner, rows, len(video))
        first = torch.searchsorted(video[owner], torch.arange(len(t), device=t.device))
        clip = placed.nonzero()[:, 0][first][video]
        sound = self.sound(model, inputs) if self.sound is not None else ()
        return FrameRows(clip, len(placed), tokens, rows, (full, merged), sound)

    def pixels(self, model, inputs):
        config, frames = model.config.vision_config, []
        (t, h, w), merge = self._grid(model, inputs)
        sizes, start = (t * h * w).tolist(), 0
        joined = getattr(config, "temporal_patch_size", 1)
        for size, *(steps, high, wide), m in zip(
            sizes, t.tolist(), h.tolist(), w.tolist(), merge.tolist(), strict=True
        ):
            patches = inputs[self.arg][start : start + size]
            blocks = (steps, high // m, wide // m, m, m, 3, joined, config.patch_size, config.patch_size)
            # -> step, real frame, colour, then rows (block, patch, pixel) and columns
            image = patches.view(blocks).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            image = image.reshape(steps, joined, 3, high * config.patch_size, wide * config.patch_size)
            frames.append(F.interpolate(image.mean(1).float(), (PIXELS, PIXELS), mode="area"))
            start += size
        return torch.cat(frames)

    def _grid(self, model, inputs) -> tuple[tuple[Tensor, ...], Tensor]:
        """((t, h, w), merge), each [V]."""
        grid = inputs[self.grid]
        if self.merges is not None:
            return grid.unbind(1), inputs[self.merges]
        merge = model.config.vision_config.spatial_merge_size
        return grid.unbind(1), torch.full_like(grid[:, 0], merge)


@dataclass(frozen=True)
class PairedTexts(FrameSource):
    """Clips [V, T, 3, H, W] beside texts [R, L] that must not know them: a text is a clip without frames."""

    arg: str = "pixel_values"

    def __call__(self, model, inputs):
        pixels = inputs.get(self.arg)
        if pixels is None:
            return None
        videos, frames = pixels.shape[:2]
        texts = 0 if inputs.get("input_ids") is None else len(inputs["input_ids"])
        clip = torch.arange(videos, device=pixels.device).repeat_interleave(frames)
        text_clip = videos + torch.arange(texts, device=pixels.device)
        return FrameRows(clip, videos + texts, row_clip=text_clip)

    def pixels(self, model, inputs):
        return inputs[self.arg].flatten(0, 1)


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


def refuse_images(inputs: Mapping[str, Any]) -> None:
    """ValueError for images beside videos: the tower runs once for each, and rows could not be told apart."""
    if inputs.get("pixel_values") is not None:
        raise ValueError("pixel_values: images beside videos in one batch are not supported; send one kind")
