"""Tiny random models of every supported class, and batches for them: for tests and the compatibility table.

    model = tiny_model("smolvlm")                 # two layers a part, widths that NF4 can hold, eval, float32
    batch = tiny_batch("smolvlm", model)          # two clips of three frames, forward-ready, with labels
    model(**batch).loss

Token ids: 0 padding, 1 begin, 2 end, 5 image, 6 video, text from 16 on. The vocabulary has 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
IMAGE, VIDEO = 5, 6
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Tiny:
    """How to build a class: `build()` gives the model, `batch(model, clips, frames, draw)` its inputs."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[[PreTrainedModel, int, int, Draw], dict[str, Tensor]]


@dataclass(frozen=True)
class Draw:
    """Random inputs from one seed."""

    rng: torch.Generator

    def pixels(self, *shape: int) -> Tensor:
        """Frames in [-1, 1] that change smoothly, as in a video."""
        return (torch.randn(shape, generator=self.rng) / 2).clamp(-1, 1)

    def words(self, rows: int, count: int) -> Tensor:
        return torch.randint(16, VOCABULARY, (rows, count), generator=self.rng)

    def prompt(self, rows: int, placeholders: list[int] | Tensor) -> dict[str, Tensor]:
        """<bos>, the placeholders (0 stands for a word) and four words; labels on the words after them."""
        middle = torch.as_tensor(placeholders).expand(rows, -1)
        middle = torch.where(middle == 0, self.words(rows, middle.shape[1]), middle)
        ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), middle, self.words(rows, 4)], dim=1)
        labels = ids.clone()
        labels[:, :-4] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the class, the same for the same seed; eval mode, float32.

    Raises KeyError for an unknown name.
    """
    tiny = _tiny(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny.build().eval()


def tiny_batch(
    name: str, model: PreTrainedModel, clips: int = 2, frames: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of one forward: `clips` videos of `frames` frames; labels where there is a decoder."""
    return _tiny(name).batch(model, clips, frames, Draw(torch.Generator().manual_seed(seed)))


def _tiny(name: str) -> Tiny:
    if name not in ZOO:
        raise KeyError(f"no tiny model {name!r}; known: {', '.join(ZOO)}")
    return ZOO[name]


def _kinevlm() -> PreTrainedModel:
    from vqlora.base import KineVLMForConditionalGeneration, small_config

    shape = {"width": 64, "layers": 2, "vision_width": 64, "vision_layers": 2, "vision_heads": 2}
    return KineVLMForConditionalGeneration(small_config(VOCABULARY, image_token_id=IMAGE, **shape))


def _kinevlm_batch(model, clips, frames, draw):
    prompt = draw.prompt(clips, [IMAGE] * model.config.tokens_per_frame * frames)
    times = torch.linspace(0, 1, frames).expand(clips, -1)
    return {**prompt, "pixel_values": draw.pixels(clips, frames, 3, 64, 64), "frame_times": times}


def _smolvlm() -> PreTrainedModel:
    text = {"model_type": "llama", **_TEXT}
    config = transformers.SmolVLMConfig(
        vision_config=_VISION, text_config=text, scale_factor=2, image_token_id=IMAGE, pad_token_id=0
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _between_words(placeholder: int, per_frame: int) -> Callable:
    """Batches [B, T, 3, 32, 32] whose prompt has a word before each frame."""

    def batch(model, clips, frames, draw):
        prompt = draw.prompt(clips, ([0] + [placeholder] * per_frame) * frames)
        return {**prompt, "pixel_values": draw.pixels(clips, frames, 3, 32, 32)}

    return batch


def _llava_onevision() -> PreTrainedModel:
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _videos(per_frame: int, newline: int = 0) -> Callable:
    """Batches with `pixel_values_videos` [B, T, 3, 32, 32] and one run of placeholders per clip."""

    def batch(model, clips, frames, draw):
        prompt = draw.prompt(clips, [VIDEO] * (per_frame * frames + newline))
        return {**prompt, "pixel_values_videos": draw.pixels(clips, frames, 3, 32, 32)}

    return batch


ZOO: dict[str, Tiny] = {
    "kinevlm": Tiny(_kinevlm, _kinevlm_batch),
    "smolvlm": Tiny(_smolvlm, _between_words(IMAGE, 4)),
    "llava_onevision": Tiny(_llava_onevision, _videos(4, newline=1)),
}
