"""The table of known architectures: parts, row layouts, mixing and exceptions of each, and why.

`vqlora.modalities` loads it on first use. Every entry is checked by perturbing single frames of a tiny random
model (`vqlora.zoo`): only that frame's rows may change in a layer that is not `mixed`.
"""

from __future__ import annotations

from vqlora.modalities import register_modalities
from vqlora.rows import Clips, PaddedImages

# In a decoder the first layer's projections still see one token, hence one frame, per row.
_FIRST = ("model.language_model.layers.0.self_attn.[qkv]_proj",)
_POOLING = "pooling head of the tower; the model reads the patches, not the pooled vector"


def _smolvlm_tokens(model, height: int, width: int) -> int:
    config = model.config
    patch = config.vision_config.patch_size
    return (height // patch) * (width // patch) // config.scale_factor**2


register_modalities(
    "kinevlm",
    vision=("model.vision_tower",),
    fusion=("model.multi_modal_projector",),
    text=("model.language_model",),
    heads=("lm_head", "embed_head"),
    keep=("model.multi_modal_projector.time",),  # 32 inputs: less than a quantization block
    layouts={"model.multi_modal_projector": "cross"},  # [B, T, M, D], flattened by its rows
    # the projector's input already holds the difference to the previous frame
    mixes=("model.multi_modal_projector", "model.language_model"),
    rows=Clips("pixel_values", "image_token_id", shared=True),
)
register_modalities(
    "smolvlm",
    vision=("model.vision_model",),
    fusion=("model.connector",),
    text=("model.text_model",),
    mixes=("model.text_model",),
    unmixed=("model.text_model.layers.0.self_attn.[qkv]_proj",),
    rows=PaddedImages(_smolvlm_tokens),
)
register_modalities(
    "llava_onevision",
    vision=("model.vision_tower",),
    fusion=("model.multi_modal_projector",),
    text=("model.language_model",),
    mixes=("model.language_model",),
    unmixed=_FIRST,
    never={"model.vision_tower.*head": _POOLING},
    rows=Clips("pixel_values_videos", "video_token_id", newline=1),
)
