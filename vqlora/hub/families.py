"""What each class wants: sizes of its frames, the text that stands for a clip, the tensors that hold it.

A clip's text is the one the class's own processor writes; tests hold it against that. Classes that only know
images get a clip as one image a frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.smolvlm import processing_smolvlm as smolvlm

from vqlora.hub.pixels import (
    Sizes,
    dynamic,
    number,
    padded,
    patches,
    plain,
    shared_budget,
    shared_limit,
    squared,
)


@dataclass(frozen=True)
class Shown:
    """A clip as its text tells of it: `steps` frames (or groups of frames) of `tokens` placeholders each."""

    steps: int
    tokens: int
    token: str  # the placeholder
    seconds: tuple[float, ...]  # of every frame
    duration_s: float
    word: Callable[[str, str], str]  # the tokenizer's own form of a special token, else the usual one


@dataclass(frozen=True)
class Family:
    """sizes: from (numbers, frames, height, width) to the sizes a frame is resized to in turn.
    tokens: from (configuration, height, width) of resized frames to the placeholders of a step.
    text: what stands for a clip. lay: from clips [T, 3, h, w] to arguments of the model.
    token: the configuration's name for the placeholder's id.
    mark: what the chat template writes for a video; None for the placeholder itself.
    images: the template is given a frame at a time, as images; `text` then stands for one.
    around: what a template writes around `mark` that the text brings itself.
    whole: frames keep their proportions, so that videos are not stored as squares.
    joined: `temporal_patch_size` frames make a step.
    tidy: from (whole prompt, `Shown.word`) to the prompt, where clips that touch are written otherwise.
    template: used instead of the checkpoint's, where that one is made for images alone.
    """

    sizes: Callable[[Mapping, int, int, int], Sizes]
    tokens: Callable[[Any, int, int], int]
    text: Callable[[Shown], str]
    lay: Callable[[Sequence[np.ndarray], Mapping, Sequence[float]], dict[str, Tensor]]
    token: str = "video_token_id"
    mark: tuple[str, str] | None = None
    images: bool = False
    around: tuple[str, str] = ("", "")
    whole: bool = False
    template: str | None = None
    joined: bool = False
    tidy: Callable[[str, Callable], str] = lambda text, word: text


def in_words(count: int) -> str:
    """A whole number below a thousand in English words: 28 -> "twenty-eight"."""
    if count < 20:
        return _ONES[count]
    if count < 100:
        return _TENS[count // 10] + (f"-{_ONES[count % 10]}" if count % 10 else "")
    rest = f" and {in_words(count % 100)}" if count % 100 else ""
    return f"{_ONES[count // 100]} hundred{rest}"


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = ("", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split())


# text


def _run(shown: Shown) -> str:
    return shown.token * shown.tokens * shown.steps


def _with_newline(shown: Shown) -> str:
    return _run(shown) + shown.token


def _smolvlm_image(shown: Shown) -> str:
    fake = shown.word("fake_image_token", "<fake_token_around_image>")
    return f"{fake}{shown.word('global_image_token', '<global-img>')}{shown.token * shown.tokens}{fake}"


def _smolvlm(shown: Shown) -> str:
    """Every frame with its minute and second."""
    length = str(timedelta(seconds=int(shown.duration_s)))
    text = smolvlm.DEFAULT_VIDEO_INTRO.format(frame_count=in_words(shown.steps), video_duration=length)
    for second in shown.seconds:
        stamp = f"{int(second // 60):02d}:{int(second % 60):02d}"
        text += smolvlm.FRAME_TIMESTAMP_MESSAGE.format(timestamp=stamp) + _smolvlm_image(shown)
    return text + smolvlm.DEFAULT_MEDIA_OUTTRO


def _idefics2_image(shown: Shown) -> str:
    fake = shown.word("image_boundary_token", "<fake_token_around_image>")
    return f"{fake}{shown.token * shown.tokens}{fake}"


def _idefics2_touching(text: str, word: Callable) -> str:
    """Images that touch share the token between them; a word after one stands apart."""
    fake = word("image_boundary_token", "<fake_token_around_image>")
    return re.sub(rf"{re.escape(fake)}(?=[^\s<])", f"{fake} ", text.replace(fake + fake, fake))


def _internvl(shown: Shown) -> str:
    start, end = shown.word("start_image_token", "<img>"), shown.word("end_image_token", "</img>")
    frames = [f"Frame{i + 1}: {start}{shown.token * shown.tokens}{end}" for i in range(shown.steps)]
    return "\n".join(frames)


def _qwen3_vl(shown: Shown) -> str:
    """Every step with the mean time of its first and last frame."""
    start, end = shown.word("vision_start_token", _VISION[0]), shown.word("vision_end_token", _VISION[1])
    each = math.ceil(len(shown.seconds) / shown.steps)
    text = ""
    for step in range(shown.steps):
        times = shown.seconds[step * each : (step + 1) * each]
        text += f"<{(times[0] + times[-1]) / 2:.1f} seconds>{start}{shown.token * shown.tokens}{end}"
    return text


def _video_llama_3(shown: Shown) -> str:
    """Every frame with its second. All tokens are kept: stock drops those of patches that hardly change."""
    return ",".join(f"Time {second:.1f}s:{shown.token * shown.tokens}" for second in shown.seconds)


# tensors


def _clips(key: str) -> Callable:
    def lay(clips, numbers, durations_s):
        return {key: torch.from_numpy(np.stack(clips))}

    return lay


def _frames(clips, numbers, durations_s):
    return {"pixel_values": torch.from_numpy(np.concatenate(clips))}


def _padded(clips, numbers, durations_s):
    pixels, mask = padded(clips)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _packed(clips, numbers, durations_s) -> dict[str, Tensor]:
    made = [patches(clip, numbers) for clip in clips]
    return {
        "pixel_values_videos": torch.cat([flat for flat, _ in made]),
        "video_grid_thw": torch.tensor([grid for _, grid in made]),
    }


def _packed_in_time(clips, numbers, durations_s):
    """With the seconds of a step, by which Qwen2.5-VL places frames in time."""
    laid = _packed(clips, numbers, durations_s)
    laid["second_per_grid_ts"] = torch.tensor(durations_s) / laid["video_grid_thw"][:, 0]
    return laid


def _packed_with_merges(clips, numbers, durations_s):
    laid = _packed(clips, numbers, durations_s)
    laid["video_merge_sizes"] = torch.full((len(clips),), number(numbers, "merge_size"))
    return laid


# tokens of a frame


def _shuffled(config, height: int, width: int) -> int:
    patch = config.vision_config.patch_size
    return (height // patch) * (width // patch) // config.scale_factor**2


def _pooled(config, height: int, width: int) -> int:
    patch = config.vision_config.patch_size
    return math.ceil(height // patch / 2) * math.ceil(width // patch / 2)


def _quarter(config, height: int, width: int) -> int:
    patch = config.vision_config.patch_size
    return (height // patch) * (width // patch) // 4


def _with_class_token(config, height: int, width: int) -> int:
    patch = config.vision_config.patch_size
    return (height // patch) * (width // patch) + 1


def _merged(config, height: int, width: int) -> int:
    vision = config.vision_config
    side = vision.patch_size * getattr(vision, "spatial_merge_size", 2)
    return (height // side) * (width // side)


_VISION = ("<|vision_start|>", "<|vision_end|>")
_VIDEO = ("video_token", "<video>")
_IMAGES = {"token": "image_token_id", "images": True}
FAMILIES: dict[str, Family] = {
    "smolvlm": Family(
        squared,
        _shuffled,
        _smolvlm,
        _padded,
        token="image_token_id",
        mark=_VIDEO,
        template=smolvlm.DEFAULT_CHAT_TEMPLATE,
    ),
    "idefics3": Family(squared, _shuffled, _smolvlm_image, _padded, **_IMAGES),
    "idefics2": Family(
        plain,
        lambda config, h, w: config.perceiver_config.resampler_n_latents,
        _idefics2_image,
        _padded,
        whole=True,
        tidy=_idefics2_touching,
        **_IMAGES,
    ),
    "llava_onevision": Family(plain, _pooled, _with_newline, _clips("pixel_values_videos")),
    "llava_next_video": Family(plain, _quarter, _run, _clips("pixel_values_videos"), whole=True),
    "video_llava": Family(plain, _with_class_token, _run, _clips("pixel_values_videos"), whole=True),
    "internvl": Family(
        plain,
        lambda config, h, w: config.image_seq_length,
        _internvl,
        _frames,
        token="image_token_id",
        mark=_VIDEO,
    ),
    "qwen2_5_vl": Family(dynamic, _merged, _run, _packed_in_time, whole=True, joined=True),
    "qwen3_vl": Family(shared_budget, _merged, _qwen3_vl, _packed, whole=True, joined=True, around=_VISION),
    "video_llama_3": Family(shared_limit, _merged, _video_llama_3, _packed_with_merges, whole=True),
}
