"""Tiny random checkpoints in the layout of the hub, for tests and trials of the whole way without a download.

    tiny_checkpoint("qwen2_5_vl", "somewhere/tiny")     # config, weights, tokenizer, processor's files

Tokenizers work letter by letter, so that any caption in lower case survives; files have, in turn, the
names that checkpoints of these classes use, old and new.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from vqlora.zoo import tiny_model

_LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789\n.,:<>-?[]'"
_COMMON = {
    0: "<pad>",
    1: "<s>",
    2: "</s>",
    3: "<unk>",
    4: "<fake_token_around_image>",
    5: "<image>",
    6: "<video>",
    7: "<audio>",
    8: "<|vision_start|>",
    9: "<|vision_end|>",
    10: "<img>",
    11: "</img>",
    12: "<end_of_utterance>",
    13: "<|im_start|>",
    14: "<|im_end|>",
    15: "<global-img>",
}
_QWEN = {5: "<|image_pad|>", 6: "<|video_pad|>"}
_INTERN = {5: "<IMG_CONTEXT>"}
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'video' %}VIDEO"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_UTTERANCES = (
    "<s>{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}{% if c.type == 'image' %}"
    "<image>{% else %} {{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_SHUFFLED = {
    **_STEPS,
    **_HALF,
    "resample": 1,
    "max_image_size": {"longest_edge": 32},
    "do_image_splitting": True,
}
_SQUARE = {**_STEPS, **_CLIP, "resample": 3, "size": {"height": 32, "width": 32}}
_CROPPED = {
    **_STEPS,
    **_CLIP,
    "resample": 3,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
}
_PATCHES = {**_STEPS, **_CLIP, "resample": 3, "patch_size": 8, "merge_size": 2}
_OLD, _VIDEO, _NEW = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"

# name -> (chat template or None, file of the processor's numbers, the numbers)
CHECKPOINTS = {
    "smolvlm": (
        _UTTERANCES,
        _OLD,
        {
            **_SHUFFLED,
            "size": {"longest_edge": 128},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 48}},
        },
    ),
    "idefics3": (_UTTERANCES, _OLD, {**_SHUFFLED, "size": {"longest_edge": 48}}),
    "idefics2": (
        _UTTERANCES,
        _OLD,
        {**_STEPS, **_HALF, "resample": 2, "size": {"shortest_edge": 24, "longest_edge": 32}},
    ),
    "llava_onevision": (_CHATML, _VIDEO, _SQUARE),
    "llava_next_video": (None, _VIDEO, _CROPPED),
    "video_llava": (None, _OLD, _CROPPED),
    "internvl": (_CHATML, _VIDEO, _SQUARE),
    "qwen2_5_vl": (
        _CHATML,
        _OLD,
        {**_PATCHES, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024},
    ),
    "qwen3_vl": (
        _CHATML,
        _NEW,
        {**_PATCHES, "temporal_patch_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 4096}},
    ),
    "video_llama_3": (
        _CHATML,
        _NEW,
        {**_PATCHES, "temporal_patch_size": 1, "size": {"shortest_edge": 256, "longest_edge": 4096}},
    ),
}


def tiny_checkpoint(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a random checkpoint of a class of `CHECKPOINTS` into a folder, which is returned.

    Raises KeyError for another name.
    """
    if name not in CHECKPOINTS:
        raise KeyError(f"no tiny checkpoint {name!r}; known: {', '.join(CHECKPOINTS)}")
    template, file, numbers = CHECKPOINTS[name]
    folder, model = Path(folder), tiny_model(name, seed)
    own = _QWEN if name.startswith("qwen") else _INTERN if name == "internvl" else {}
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0, bos_token_id=1)
    model.save_pretrained(folder)
    tokenizer = letters({**_COMMON, **own})
    mark = f"<|vision_start|>{own[6]}<|vision_end|>" if 6 in own else "<video>"
    tokenizer.chat_template = template and template.replace("VIDEO", mark)
    tokenizer.save_pretrained(folder)
    body = {"video_processor": numbers} if file == _NEW else numbers
    (folder / file).write_text(json.dumps(body, indent=1))
    return folder


def letters(special: dict[int, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, lower case, behind the special tokens with their ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: number for number, token in special.items()}
    vocabulary |= {letter: len(special) + number for number, letter in enumerate(_LETTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = [token for token in special.values() if token not in named.values()]
    return PreTrainedTokenizerFast(tokenizer_object=core, **named, additional_special_tokens=extra)
