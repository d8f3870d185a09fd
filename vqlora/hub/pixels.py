"""Frames -> pixels as a checkpoint's own processor makes them, from its numbers and without torchvision.

    frame_pixels(frames, numbers, [(512, 288), (384, 384)])      # float32 [T, 3, 384, 384]

The steps are transformers' own (Pillow's resampling), those of its image processors that run without
torchvision; with torchvision, processors resample with other code, whose results differ by a grey level here
and there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_transforms import (
    center_crop,
    get_resize_output_image_size,
    normalize,
    rescale,
    resize,
)
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.idefics2.image_processing_pil_idefics2 import (
    get_resize_output_image_size as within_edges,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    get_resize_output_image_size as to_longest_edge,
)

Sizes = list[tuple[int, int]]  # (height, width) after each resizing
_FIRST = {"data_format": ChannelDimension.FIRST, "input_data_format": ChannelDimension.FIRST}


def frame_pixels(frames: np.ndarray, numbers: Mapping[str, Any], sizes: Sizes) -> np.ndarray:
    """uint8 `[T, H, W, 3]` -> float32 `[T, 3, h, w]`: resized to each of `sizes` in turn, cropped, scaled.

    Raises ValueError for a number that the processor's file lacks.
    """
    made = []
    for frame in frames:
        x = np.ascontiguousarray(frame.transpose(2, 0, 1))
        if numbers.get("do_resize", True):
            for size in sizes:
                x = resize(x, size, resample=number(numbers, "resample"), **_FIRST)
        if numbers.get("do_center_crop"):
            crop = number(numbers, "crop_size")
            crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
            x = center_crop(x, (crop["height"], crop["width"]), **_FIRST)
        if numbers.get("do_rescale", True):
            x = rescale(x, numbers.get("rescale_factor", 1 / 255), **_FIRST)
        if numbers.get("do_normalize", True):
            x = normalize(x, number(numbers, "image_mean"), number(numbers, "image_std"), **_FIRST)
        made.append(x)
    return np.stack(made).astype(np.float32)


def number(numbers: Mapping[str, Any], key: str) -> Any:
    if numbers.get(key) is None:
        raise ValueError(
            f"{key}: missing among the numbers of the checkpoint's processor, which has "
            f"{', '.join(sorted(numbers))}"
        )
    return numbers[key]


def plain(numbers, frames: int, height: int, width: int) -> Sizes:
    """One size for all, or the shortest edge at a given length."""
    size = number(numbers, "size")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "height" in size:
        return [(size["height"], size["width"])]
    shown = np.empty((3, height, width), np.uint8)
    if "longest_edge" in size:
        return [within_edges(shown, SizeDict(**size))]
    how = {"default_to_square": False, "input_data_format": ChannelDimension.FIRST}
    return [get_resize_output_image_size(shown, size["shortest_edge"], **how)]


def squared(numbers, frames: int, height: int, width: int) -> Sizes:
    """SmolVLM and Idefics3 on whole frames: the longest edge first, then a square."""
    size = (numbers.get("video_sampling") or {}).get("video_size") or number(numbers, "size")
    side = number(numbers, "max_image_size")["longest_edge"]
    if "height" in size:
        return [(size["height"], size["width"]), (side, side)]
    return [to_longest_edge(np.empty((3, height, width), np.uint8), size["longest_edge"]), (side, side)]


def dynamic(numbers, frames: int, height: int, width: int) -> Sizes:
    """Qwen2.5-VL: as large as the video is, in multiples of a merged patch, within bounds for a frame."""
    return [_bounded(numbers, height, width, 1, 1)]


def shared_budget(numbers, frames: int, height: int, width: int) -> Sizes:
    """Qwen3-VL: the bounds are for all frames together."""
    even = -(-frames // numbers.get("temporal_patch_size", 2)) * numbers.get("temporal_patch_size", 2)
    return [_bounded(numbers, height, width, even, even)]


def shared_limit(numbers, frames: int, height: int, width: int) -> Sizes:
    """VideoLLaMA3: the upper bound is for all frames together."""
    return [_bounded(numbers, height, width, 1, frames)]


def patches(pixels: np.ndarray, numbers: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int, int]]:
    """[T, 3, h, w] -> ([patches, 3 * t * p * p], grid (T / t, h / p, w / p)) in the order of the Qwen family.

    Patches that are merged into one token are neighbours; t frames make a step, the last one repeated where
    they do not come out even.
    """
    size, merge = number(numbers, "patch_size"), number(numbers, "merge_size")
    joined = number(numbers, "temporal_patch_size")
    missing = -len(pixels) % joined
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    steps, (high, wide) = len(pixels) // joined, (edge // size for edge in pixels.shape[-2:])
    shape = (steps, joined, 3, high // merge, merge, size, wide // merge, merge, size)
    blocks = torch.from_numpy(pixels).reshape(shape)
    # step, block row, block column, row and column in the block; then colour, frame, pixel row, pixel column
    flat = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * high * wide, -1)
    return flat, (steps, high, wide)


def padded(clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Clips [T, 3, h, w] of any sizes -> ([B, T, 3, H, W] filled with zeros, mask [B, T, H, W] of pixels)."""
    count, high, wide = (max(clip.shape[i] for clip in clips) for i in (0, 2, 3))
    pixels = torch.zeros(len(clips), count, 3, high, wide)
    mask = torch.zeros(len(clips), count, high, wide, dtype=torch.long)
    for row, clip in enumerate(clips):
        frames, _, h, w = clip.shape
        pixels[row, :frames, :, :h, :w] = torch.from_numpy(clip)
        mask[row, :frames, :h, :w] = 1
    return pixels, mask


def _bounded(numbers, height: int, width: int, low: int, high: int) -> tuple[int, int]:
    size = dict(numbers.get("size") or {})
    least = numbers.get("min_pixels") or number(size, "shortest_edge")
    most = numbers.get("max_pixels") or number(size, "longest_edge")
    factor = number(numbers, "patch_size") * number(numbers, "merge_size")
    return smart_resize(
        height, width, factor=factor, min_pixels=math.ceil(least / low), max_pixels=most // high
    )
