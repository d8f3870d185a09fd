"""Configurations and batches of the tiny models in `vqlora.zoo`, one entry per supported class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = 5, 6, 7, 8, 9, 10, 11
WORD = 0  # in a prompt: any word
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
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


@dataclass(frozen=True)
class Tiny:
    """How to build a class: `build()` gives the model, `batch(model, counts, draw)` its inputs for clips of
    `counts` frames. `even`: all clips of a batch must have equally many."""

    build: Callable[[], PreTrainedModel]
    batch: Callable[[PreTrainedModel, Sequence[int], Draw], dict[str, Tensor]]
    even: bool = True


@dataclass(frozen=True)
class Draw:
    """Random inputs from one seed."""

    rng: torch.Generator

    def pixels(self, *shape: int) -> Tensor:
        """Noise in [-1, 1]."""
        return (torch.randn(shape, generator=self.rng) / 2).clamp(-1, 1)

    def words(self, *shape: int) -> Tensor:
        return torch.randint(16, VOCABULARY, shape, generator=self.rng)

    def prompt(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """<bos>, the given ids and four words, padded on the left; the last four words are the labels."""
        length = max(map(len, rows)) + 5
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length).long()
        for row, given in enumerate(rows):
            middle = torch.tensor(given, dtype=torch.long)
            middle = torch.where(middle == WORD, self.words(len(middle)), middle)
            start = length - len(given) - 5
            ids[row, start:] = torch.cat([torch.ones(1, dtype=torch.long), middle, self.words(4)])
            mask[row, start:] = 1
        labels = ids.clone()
        labels[:, :-4] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _kinevlm() -> PreTrainedModel:
    from vqlora.base import KineVLMForConditionalGeneration, small_config

    shape = {"width": 64, "layers": 2, "vision_width": 64, "vision_layers": 2, "vision_heads": 2}
    return KineVLMForConditionalGeneration(small_config(VOCABULARY, image_token_id=IMAGE, **shape))


def _kinevlm_batch(model, counts, draw):
    prompt = draw.prompt([[IMAGE] * model.config.tokens_per_frame * n for n in counts])
    times = torch.linspace(0, 1, counts[0]).expand(len(counts), -1)
    return {**prompt, "pixel_values": draw.pixels(len(counts), counts[0], 3, 64, 64), "frame_times": times}


def _idefics_like(kind: str) -> Callable[[], PreTrainedModel]:
    """SmolVLM and Idefics3: a SigLIP-like tower, pixel shuffle, Llama."""

    def build():
        config = getattr(transformers, f"{kind}Config")(
            vision_config=_VISION,
            text_config={"model_type": "llama", **_TEXT},
            scale_factor=2,
            image_token_id=IMAGE,
            pad_token_id=0,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _idefics2() -> PreTrainedModel:
    perceiver = {
        "hidden_size": 64,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 32,
        "num_key_value_heads": 2,
    }
    config = transformers.Idefics2Config(
        vision_config=_VISION,
        perceiver_config=perceiver,
        text_config={"model_type": "mistral", **_TEXT},
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def _padded_images(model, counts, draw):
    """[B, N, 3, 32, 32], absent frames zero; a word before the four tokens of each frame."""
    pixels = draw.pixels(len(counts), max(counts), 3, 32, 32)
    for row, count in enumerate(counts):
        pixels[row, count:] = 0
    return {**draw.prompt([[WORD, *[IMAGE] * 4] * n for n in counts]), "pixel_values": pixels}


def _idefics() -> PreTrainedModel:
    vision = {**_VISION, "embed_dim": 64}
    del vision["hidden_size"]
    config = transformers.IdeficsConfig(
        **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"},
        vision_config=vision,
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 32,
        },
        use_resampler=True,
        alpha_initializer="ones",  # at zero the cross-attention would be closed
        freeze_text_layers=False,
        freeze_vision_layers=False,
    )
    return transformers.IdeficsForVisionText2Text(config)


def _idefics_batch(model, counts, draw):
    prompt = draw.prompt([[WORD]] * len(counts))
    seen = prompt["attention_mask"][..., None].expand(-1, -1, counts[0])
    pixels = draw.pixels(len(counts), counts[0], 3, 32, 32)
    return {**prompt, "pixel_values": pixels, "image_attention_mask": seen.contiguous()}


def _llava(kind: str, tower: str, text: str) -> Callable[[], PreTrainedModel]:
    def build():
        config = getattr(transformers, f"{kind}Config")(
            vision_config={"model_type": tower, **_VISION},
            text_config={"model_type": text, **_TEXT},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _videos(per_frame: int, newline: int = 0, key: str = "pixel_values_videos") -> Callable:
    """[B, T, 3, 32, 32] and one run of placeholders per clip."""

    def batch(model, counts, draw):
        prompt = draw.prompt([[VIDEO] * (per_frame * n + newline) for n in counts])
        return {**prompt, key: draw.pixels(len(counts), counts[0], 3, 32, 32)}

    return batch


def _internvl() -> PreTrainedModel:
    config = transformers.InternVLConfig(
        vision_config={**_VISION, "image_size": (32, 32), "patch_size": (8, 8)},
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _internvl_batch(model, counts, draw):
    prompt = draw.prompt([[WORD, *[IMAGE] * 4] * n for n in counts])
    return {**prompt, "pixel_values": draw.pixels(sum(counts), 3, 32, 32)}


def _instructblipvideo() -> PreTrainedModel:
    config = transformers.InstructBlipVideoConfig(
        vision_config=_VISION,
        qformer_config={
            **{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"},
            "encoder_hidden_size": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={"model_type": "llama", **_TEXT},
        num_query_tokens=4,
        video_token_index=VIDEO,
    )
    return transformers.InstructBlipVideoForConditionalGeneration(config)


def _instructblipvideo_batch(model, counts, draw):
    batch = _videos(4, key="pixel_values")(model, counts, draw)
    return {**batch, "qformer_input_ids": draw.words(len(counts), 3)}


def _video_llama_3() -> PreTrainedModel:
    vision = {k: v for k, v in _VISION.items() if k != "image_size"}
    config = transformers.VideoLlama3Config(
        vision_config=vision, text_config={"model_type": "qwen2", **_TEXT}, **_IDS
    )
    return transformers.VideoLlama3ForConditionalGeneration(config)


def _video_llama_3_batch(model, counts, draw):
    shown = [n for n in counts if n]
    return {
        **draw.prompt([[WORD, *[VIDEO] * 4] * n for n in counts]),
        "pixel_values_videos": draw.pixels(16 * sum(counts), 3 * 8 * 8),
        "video_grid_thw": torch.tensor([[n, 4, 4] for n in shown]),
        "video_merge_sizes": torch.full((len(shown),), 2),
    }


def _qwen_vision(**more) -> dict:
    return {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        **more,
    }


def _qwen2_5_vl() -> PreTrainedModel:
    config = transformers.Qwen2_5_VLConfig(
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        text_config={**_TEXT, "rope_parameters": _MROPE},
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **_IDS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    config = transformers.Qwen3VLConfig(
        vision_config=_qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        text_config={**_TEXT, "head_dim": 32, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **_IDS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen2_5_omni() -> PreTrainedModel:
    config = transformers.Qwen2_5OmniThinkerConfig(
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        audio_config={
            "num_mel_bins": 16,
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "output_dim": 64,
            "n_window": 4,
            "max_source_positions": 32,
        },
        text_config={**_TEXT, "rope_parameters": _MROPE},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _patches(counts, draw) -> dict[str, Tensor]:
    """One step is a frame of 4 x 4 patches of 8 x 8 pixels, of two real frames."""
    return {
        "pixel_values_videos": draw.pixels(16 * sum(counts), 3 * 2 * 8 * 8),
        "video_grid_thw": torch.tensor([[n, 4, 4] for n in counts if n]),
    }


def _qwen_batch(apart: bool) -> Callable:
    """apart: a word (a time stamp) between frames, as Qwen3-VL wants it."""

    def batch(model, counts, draw):
        frame, whole = [VIDEO] * 4, lambda n: [VISION_START, *[VIDEO] * 4 * n, VISION_END]
        rows = [([WORD, VISION_START, *frame, VISION_END] * n if apart else whole(n)) for n in counts]
        prompt = draw.prompt(rows)
        types = (prompt["input_ids"] == VIDEO).int() * 2
        return {**prompt, **_patches(counts, draw), "mm_token_type_ids": types}

    return batch


def _qwen2_5_omni_batch(model, counts, draw):
    """Sound of 18 + 2 b mel steps beside clip b: 5 tokens, as the last half step is dropped."""
    sound, shown = [18 + 2 * b for b in range(len(counts))], [n for n in counts if n]
    tokens = [((n - 1) // 2 - 1) // 2 + 1 for n in sound]
    rows = [
        [*([VISION_START, *[VIDEO] * 4 * n, VISION_END] if n else []), AUDIO_START, *[AUDIO] * a, AUDIO_END]
        for n, a in zip(counts, tokens, strict=True)
    ]
    mask = torch.arange(max(sound)) < torch.tensor(sound)[:, None]
    return {
        **draw.prompt(rows),
        **_patches(counts, draw),
        "video_second_per_grid": torch.ones(len(shown)),
        "input_features": draw.pixels(len(counts), 16, max(sound)),
        "feature_attention_mask": mask.long(),
    }


def _xclip() -> PreTrainedModel:
    vision = {
        **_VISION,
        "num_frames": 3,
        "mit_hidden_size": 64,
        "mit_intermediate_size": 128,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
    config = transformers.XCLIPConfig(
        vision_config=vision, text_config=text, projection_dim=64, prompt_num_attention_heads=2
    )
    return transformers.XCLIPModel(config)


def _xclip_batch(model, counts, draw):
    wanted = model.config.vision_config.num_frames
    if set(counts) != {wanted}:
        raise ValueError(f"frames: {counts}: this X-CLIP takes {wanted} a clip")
    prompt = draw.prompt([[WORD]] * len(counts))
    del prompt["labels"]
    return {**prompt, "pixel_values": draw.pixels(len(counts), counts[0], 3, 32, 32), "return_loss": True}


ZOO: dict[str, Tiny] = {
    "kinevlm": Tiny(_kinevlm, _kinevlm_batch),
    "smolvlm": Tiny(_idefics_like("SmolVLM"), _padded_images, even=False),
    "idefics": Tiny(_idefics, _idefics_batch),
    "idefics2": Tiny(_idefics2, _padded_images, even=False),
    "idefics3": Tiny(_idefics_like("Idefics3"), _padded_images, even=False),
    "llava_onevision": Tiny(_llava("LlavaOnevision", "siglip_vision_model", "qwen2"), _videos(4, newline=1)),
    "llava_next_video": Tiny(_llava("LlavaNextVideo", "clip_vision_model", "llama"), _videos(4)),
    "video_llava": Tiny(_llava("VideoLlava", "clip_vision_model", "llama"), _videos(17)),
    "internvl": Tiny(_internvl, _internvl_batch, even=False),
    "instructblipvideo": Tiny(_instructblipvideo, _instructblipvideo_batch),
    "video_llama_3": Tiny(_video_llama_3, _video_llama_3_batch, even=False),
    "qwen2_5_vl": Tiny(_qwen2_5_vl, _qwen_batch(apart=False), even=False),
    "qwen3_vl": Tiny(_qwen3_vl, _qwen_batch(apart=True), even=False),
    "qwen2_5_omni": Tiny(_qwen2_5_omni, _qwen2_5_omni_batch, even=False),
    "xclip": Tiny(_xclip, _xclip_batch),
}
