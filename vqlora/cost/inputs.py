"""Batches of any size for a model that is only planned: ids, masks and pixels as its forward wants them.

    clip_batch(model, batch=4, frames=8, prompt=32, answer=16)    # one clip, one prompt, one answer a row

Pixels are one grey frame shown again and again: they take the memory of one frame here, and
`batch_bytes` counts what they take when they are all there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

WORD = 3  # an id that stands for any word


def clip_batch(
    model: nn.Module, batch: int, frames: int, prompt: int, answer: int, tokens_per_frame: int | None = None
) -> dict[str, Tensor]:
    """Arguments of one training forward: `frames` frames, `prompt` words and `answer` learned words a row.

    tokens_per_frame: for decoders without a vision tower, how many tokens stand for a frame; other classes
        say it themselves, and another number is a ValueError.
    Raises ValueError for counts below 1 and for classes whose inputs are not known here.
    """
    for name, value in (("batch", batch), ("prompt", prompt), ("answer", answer)):
        if value < 1:
            raise ValueError(f"{name}: {value}; allowed: whole numbers from 1")
    if frames < 0:
        raise ValueError(f"frames: {frames}; allowed: whole numbers from 0")
    config = model.config
    if not is_video_config(config):
        run, extra = [WORD] * (frames * (tokens_per_frame or 0)), {}
    else:
        own, run, extra = _clips(config, batch, frames)
        if tokens_per_frame not in (None, own):
            raise ValueError(
                f"tokens_per_frame: {tokens_per_frame} given, but {config.model_type} makes {own} of a frame"
            )
    row = torch.tensor([WORD] * (prompt // 2) + run + [WORD] * (prompt - prompt // 2) + [WORD] * answer)
    ids = row.repeat(batch, 1)
    labels = ids.clone()
    labels[:, :-answer] = -100
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}
    if config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        out["mm_token_type_ids"] = (ids == config.video_token_id).int() * 2
    return out


def prompt_only(batch: Mapping[str, Tensor], answer: int) -> dict[str, Tensor]:
    """What `generate` gets: the batch without its labels and from the first learned token on, or without the
    last `answer` tokens where labels do not tell."""
    length = batch["input_ids"].shape[1]
    learned = (batch["labels"] != -100).any(dim=0) if "labels" in batch else None
    first = int(learned.int().argmax()) if learned is not None and learned.any() else 0
    cut = {key: batch[key][:, : first or length - answer] for key in _ROWS if key in batch}
    return {**{key: value for key, value in batch.items() if key not in (*_ROWS, "labels")}, **cut}


def batch_bytes(batch: Mapping[str, Tensor]) -> int:
    """Bytes of a batch's tensors, repeated values included."""
    return sum(value.numel() * value.element_size() for value in batch.values())


def is_video_config(config: PreTrainedConfig) -> bool:
    """Whether the configuration is of a model that sees frames."""
    return config.model_type in _CLASSES or getattr(config, "vision_config", None) is not None


_ROWS = ("input_ids", "attention_mask", "mm_token_type_ids")


def _clips(config, batch: int, frames: int) -> tuple[int, list[int], dict[str, Tensor]]:
    """(tokens of a frame, placeholder run of a row, pixel arguments)."""
    if config.model_type not in _CLASSES:
        raise ValueError(
            f"model type {config.model_type!r}: its inputs are not known here; allowed: "
            f"{', '.join(_CLASSES)}; for another class give inputs=(batch, frames) -> dict of tensors"
        )
    return _CLASSES[config.model_type](config, batch, frames)


def _grey(*shape: int) -> Tensor:
    """Grey pixels [.., 3, H, W] or [.., d], one frame in memory (black ones would be left out as padding)."""
    inner = shape[-3:] if len(shape) > 3 else shape[-1:]
    return torch.full(inner, 0.5).expand(shape)


def _side(size) -> int:
    return size if isinstance(size, int) else size[0]


def _kinevlm(config, batch, frames):
    side, times = config.image_size, torch.linspace(0, 1, max(frames, 1))[:frames].repeat(batch, 1)
    run = [config.image_token_id] * config.tokens_per_frame * frames
    return config.tokens_per_frame, run, {"pixel_values": _grey(batch, frames, 3, side, side),
                                          "frame_times": times}  # fmt: skip


def _padded_images(tokens: Callable[[PreTrainedConfig], int]):
    """Idefics2, Idefics3, SmolVLM: [B, T, 3, S, S]."""

    def make(config, batch, frames):
        side, each = config.vision_config.image_size, tokens(config)
        pixels = _grey(batch, frames, 3, side, side)
        return each, [WORD, *[config.image_token_id] * each] * frames, {"pixel_values": pixels}

    return make


def _patches(config) -> int:
    """Patches along one side."""
    return _side(config.vision_config.image_size) // _side(config.vision_config.patch_size)


def _videos(tokens: Callable[[int], int], newline: int = 0, key: str = "pixel_values_videos"):
    """The LLaVA family: [B, T, 3, S, S]; tokens from the patches along one side."""

    def make(config, batch, frames):
        side, each = _side(config.vision_config.image_size), tokens(_patches(config))
        token = config.video_token_index if hasattr(config, "video_token_index") else config.video_token_id
        run = [token] * (each * frames + newline)
        return each, run, {key: _grey(batch, frames, 3, side, side)}

    return make


def _internvl(config, batch, frames):
    side, each = _side(config.vision_config.image_size), config.image_seq_length
    run = [WORD, *[config.image_token_id] * each] * frames
    return each, run, {"pixel_values": _grey(batch * frames, 3, side, side)}


def _instructblipvideo(config, batch, frames):
    made = _videos(lambda _: config.num_query_tokens, key="pixel_values")(config, batch, frames)
    made[2]["qformer_input_ids"] = torch.full((batch, 16), WORD)
    return made


def _qwen_vl(apart: bool):
    """Qwen2.5-VL and Qwen3-VL at 224 x 224 pixels or the nearest that fits; two real frames make one step."""

    def make(config, batch, frames):
        vision = config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        side = max(1, round(224 / (patch * merge))) * merge
        if vision.patch_size < 14:  # tiny models
            side = 2 * merge
        steps, each = math.ceil(frames / vision.temporal_patch_size), (side // merge) ** 2
        start, end, token = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
        frame = [token] * each
        run = [WORD, start, *frame, end] * steps if apart else [start, *frame * steps, end]
        return each, run, {
            "pixel_values_videos": _grey(batch * steps * side**2, 3 * vision.temporal_patch_size * patch**2),
            "video_grid_thw": torch.tensor([[steps, side, side]] * batch),
        }

    return make


_CLASSES: dict[str, Callable] = {
    "kinevlm": _kinevlm,
    "smolvlm": _padded_images(lambda c: (_patches(c) // c.scale_factor) ** 2),
    "idefics3": _padded_images(lambda c: (_patches(c) // c.scale_factor) ** 2),
    "idefics2": _padded_images(lambda c: c.perceiver_config.resampler_n_latents),
    "llava_onevision": _videos(lambda n: math.ceil(n / 2) ** 2, newline=1),
    "llava_next_video": _videos(lambda n: (n // 2) ** 2),
    "video_llava": _videos(lambda n: n**2 + 1),
    "internvl": _internvl,
    "instructblipvideo": _instructblipvideo,
    "qwen2_5_vl": _qwen_vl(apart=False),
    "qwen3_vl": _qwen_vl(apart=True),
}
