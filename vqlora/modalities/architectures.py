"""The table of known architectures: parts, row layouts, mixing and exceptions of each, and why.

`vqlora.modalities` loads it on first use. Tests prove each entry on a tiny random model (`vqlora.zoo`): if
one frame is perturbed, only its rows change in layers that are not `mixed`; in a backward pass every layer
gets a gradient but those in `never`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vqlora.modalities import _ATTENTION, Modalities, register_modalities
from vqlora.modalities.sources import Clips, PackedPatches, PaddedImages, PairedTexts, SeparateFrames

# In a decoder the first layer's projections still see one token, hence one frame, per row.
_FIRST = ("model.language_model.layers.0.self_attn.[qkv]_proj",)
_POOLING = "pooling head of the tower: the model reads the patches, not the pooled vector"
_ABOVE = "above vision_feature_layer: the model reads the features below"
_LLAVA = {
    "fusion": ("model.multi_modal_projector",),
    "text": ("model.language_model",),
    "mixes": ("model.language_model",),
    "unmixed": _FIRST,
}
_IDEFICS = {
    "vision": ("model.vision_model",),
    "fusion": ("model.connector",),
    "text": ("model.text_model",),
    "mixes": ("model.text_model",),
    "unmixed": ("model.text_model.layers.0.self_attn.[qkv]_proj",),
}
_QWEN = {
    "vision": ("model.visual.patch_embed", "model.visual.blocks"),
    "text": ("model.language_model",),
    "mixes": ("model.language_model",),
    "unmixed": _FIRST,
}


def _shuffled_tokens(model: nn.Module, height: int, width: int) -> int:
    """Tokens of one frame after the pixel shuffle of SmolVLM and Idefics3."""
    patch = model.config.vision_config.patch_size
    return (height // patch) * (width // patch) // model.config.scale_factor**2


def _latents(model: nn.Module, height: int, width: int) -> int:
    """Tokens of one frame after Idefics2's perceiver."""
    return model.config.perceiver_config.resampler_n_latents


def _without_upper_layers(known: Modalities, model: nn.Module) -> Modalities:
    """LLaVA's like read the tower at `vision_feature_layer`: what lies above never gets a gradient."""
    tower = known.vision[0]
    count = model.config.vision_config.num_hidden_layers
    chosen = model.config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    used = max(layer if layer >= 0 else count + 1 + layer for layer in chosen)
    paths = [f"{tower}.*{stack}.{i}" for i in range(used, count) for stack in ("layers", "layer")]
    return replace(known, never={**known.never, **dict.fromkeys(paths, _ABOVE)})


def _omni_sound(model: nn.Module, inputs) -> tuple[torch.Tensor, ...]:
    """Rows of each clip in Qwen2.5-Omni's audio tower, and after its pooling."""
    mask, ids = inputs.get("feature_attention_mask"), inputs["input_ids"]
    if mask is None:
        return ()
    rows = (mask.sum(dim=1) - 1) // 2 + 1
    pooled = (rows - 2) // 2 + 1
    placed = (ids == model.config.audio_token_id).nonzero()[:, 0]
    clip = placed[pooled.cumsum(0) - pooled]  # the text row of each recording's first placeholder
    empty = torch.zeros(len(ids), dtype=rows.dtype, device=rows.device)
    return empty.index_add(0, clip, rows), empty.index_add(0, clip, pooled)


def _deaf(known: Modalities, model: nn.Module) -> Modalities:
    """A KineVLM without an audio tower has no audio part."""
    return known if model.config.audio_bands else replace(known, audio=())


register_modalities(
    "kinevlm",
    vision=("model.vision_tower",),
    fusion=("model.multi_modal_projector",),
    text=("model.language_model",),
    audio=("model.audio_tower",),
    heads=("lm_head", "embed_head"),
    # 32 inputs: less than a quantization block
    keep=("model.multi_modal_projector.time", "model.audio_tower.time"),
    layouts={"model.multi_modal_projector": "cross"},  # [B, T, M, D]
    # the projector's input already holds the difference to the previous frame
    mixes=("model.multi_modal_projector", "model.language_model"),
    rows=Clips("pixel_values", "image_token_id", shared=True, sound="sound"),
    refine=_deaf,
)
for _model_type in ("smolvlm", "idefics3"):
    register_modalities(_model_type, **_IDEFICS, rows=PaddedImages(_shuffled_tokens))
register_modalities("idefics2", **_IDEFICS, rows=PaddedImages(_latents))
register_modalities(
    "llava_onevision",
    vision=("model.vision_tower",),
    **_LLAVA,
    never={"model.vision_tower.*head": _POOLING},
    rows=Clips("pixel_values_videos", "video_token_id", newline=1),
    refine=_without_upper_layers,
)
register_modalities(
    "llava_next_video",
    vision=("model.vision_tower",),
    **_LLAVA,
    never={"model.vision_tower.*head": _POOLING},
    rows=Clips("pixel_values_videos", "video_token_id"),
    refine=_without_upper_layers,
)
register_modalities(
    "video_llava",
    vision=("model.video_tower", "model.image_tower"),
    **_LLAVA,
    never={"model.image_tower": "sees images only; videos go through model.video_tower"},
    rows=Clips("pixel_values_videos", "video_token_id"),
    refine=_without_upper_layers,
)
register_modalities(
    "internvl",
    vision=("model.vision_tower",),
    **_LLAVA,
    rows=SeparateFrames(),
    refine=_without_upper_layers,
)
register_modalities(
    "video_llama_3",
    vision=("model.vision_model",),
    fusion=("model.projector",),
    text=("model.language_model",),
    layouts={"model.vision_model": "flat", "model.projector": "flat"},
    mixes=("model.language_model",),
    unmixed=_FIRST,
    rows=PackedPatches(merges="video_merge_sizes"),
)
# The tower permutes patches by windows, but never across frames.
register_modalities(
    "qwen2_5_vl",
    **_QWEN,
    fusion=("model.visual.merger",),
    layouts={"model.visual": "flat"},
    rows=PackedPatches(),
)
register_modalities(
    "qwen3_vl",
    **_QWEN,
    fusion=("model.visual.merger", "model.visual.deepstack_merger_list"),
    layouts={"model.visual": "flat"},
    rows=PackedPatches(),
)
register_modalities(
    "qwen2_5_omni_thinker",
    **_QWEN,
    fusion=("model.visual.merger",),
    audio=("model.audio_tower",),
    layouts={"model.visual": "flat"},
    rows=PackedPatches(sound=_omni_sound),
)
# Flamingo: no visual token in the decoder; text reads all frames through cross-attention.
register_modalities(
    "idefics",
    vision=("model.vision_model",),
    fusion=("model.perceiver_resampler", "model.gated_cross_attn_layers"),
    text=("model.layers",),
    attention=r"\.(\w*attn|perceiver_resampler\.blocks\.\d+\.0)\.",
    layouts={
        "model.gated_cross_attn_layers": "text",
        "model.gated_cross_attn_layers.*.cross_attn.[kv]_proj": "cross",
        "model.layers": "text",
    },
    mixes=("model.gated_cross_attn_layers", "model.layers"),
    unmixed=(
        "model.gated_cross_attn_layers.*.cross_attn.[kv]_proj",
        "model.gated_cross_attn_layers.0.cross_attn.q_proj",
    ),
    rows=Clips("pixel_values", token=None),
)
# The Q-Former's rows are frames, each with its own copy of the instruction.
register_modalities(
    "instructblipvideo",
    vision=("vision_model",),
    fusion=("qformer", "language_projection"),
    text=("language_model",),
    heads=("language_model.lm_head",),
    attention=r"(?i:\.(\w*attn|\w*attention)\.)",
    layouts={
        "language_model.decoder": "text",  # of an encoder-decoder (Flan-T5), whose encoder gets the frames
        "language_model.decoder.*.EncDecAttention.[kv]": "tokens",
    },
    mixes=("language_model",),
    unmixed=(
        "language_model.model.layers.0.self_attn.[qkv]_proj",
        "language_model.model.decoder.layers.0.self_attn.[qkv]_proj",
        "language_model.encoder.block.0.layer.0.SelfAttention.[qkv]",
    ),
    rows=Clips("pixel_values", "video_token_id"),
    refine=lambda known, model: replace(
        known,
        never={
            f"qformer.encoder.layer.{model.config.qformer_config.num_hidden_layers - 1}.{part}.dense": (
                "feeds the instruction's rows of the Q-Former's last layer, which nobody reads"
            )
            for part in ("intermediate", "output")
        },
    ),
)
# Message tokens carry each frame to all others inside every layer of the tower.
register_modalities(
    "xclip",
    vision=("vision_model",),
    fusion=("visual_projection", "mit", "prompts_generator"),
    text=("text_model", "text_projection"),
    heads=(),
    attention=_ATTENTION,
    layouts={
        "vision_model.encoder.layers.*.message_attn": "cross",
        "mit": "cross",
        "prompts_generator": "clips",
        "text_model": "text",
        "text_projection": "text",
    },
    mixes=("vision_model", "visual_projection", "mit", "prompts_generator"),
    unmixed=(
        "vision_model.encoder.layers.0.message_fc",
        "vision_model.encoder.layers.0.message_attn.[qkv]_proj",
        "prompts_generator.decoder.0.cross_attn.q_proj",  # of the text alone
    ),
    rows=PairedTexts(),
)
