"""The embedded default base: its released weights, its tokenizer, its sizes; or any checkpoint by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from vqlora.kinevlm import SPECIAL_TOKENS, KineVLMConfig, KineVLMForConditionalGeneration

__all__ = ["RELEASED", "SPECIAL_TOKENS", "KineVLMConfig", "KineVLMForConditionalGeneration",
"build_tokenizer",
           "check_released", "load_base", "small_config", "tiny"]  # fmt: skip

RELEASED = Path(__file__).parent / "assets" / "kinevlm"


def small_config(vocab_size: int, width: int = 192, layers: int = 4, **overrides) -> KineVLMConfig:
    """The shape of the released base (3.4M parameters with the Kinemoji vocabulary)."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=64 * round(width * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    ids = {k: getattr(text, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return KineVLMConfig(text_config=text, **ids, **overrides)


def build_tokenizer(words) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``words`` (Chinese by characters), special tokens first, order kept."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *words)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    chinese = pre_tokenizers.Split(Regex("[\u3000-\u9fff\uff00-\uffef]"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([chinese, pre_tokenizers.WhitespaceSplit()])
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    extra = [t for t in SPECIAL_TOKENS if t not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **named, additional_special_tokens=extra, clean_up_tokenization_spaces=False
    )


def tiny(
    seed: int = 0, words=("cat", "dog", "moves", "left", "right", "spins", "then", "what", "one", "two")
):
    """A random KineVLM of 0.4M parameters and its tokenizer, for tests: ``(model, tokenizer)``."""
    tokenizer = build_tokenizer(words)
    config = small_config(
        len(tokenizer), width=64, layers=2, vision_width=64, vision_layers=2, vision_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KineVLMForConditionalGeneration(config).eval(), tokenizer


def check_released(folder: Path = RELEASED) -> Path:
    """The folder of the released base, once its weights are there and have the hash that was released with
    them."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights} is missing: check out the repository again, or train it with `make 02`"
        )
    wanted = (folder / "SHA256").read_text().split()[0]
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != wanted:
        raise ValueError(f"{weights}: SHA-256 is {found}, released was {wanted}; check the file out again")
    return folder


def load_base(name: str = "released", dtype: torch.dtype = torch.float32, **kwargs):
    """``(model, tokenizer)`` of the released base, or of any checkpoint of ``AutoModelForImageTextToText``.

    ``kwargs`` go to ``from_pretrained`` (``quantization_config`` and so on). Raises FileNotFoundError or
    ValueError when the released weights are missing or are not those that were released.
    """
    source = check_released() if name == "released" else name
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **kwargs)
    return model.eval(), AutoTokenizer.from_pretrained(source)
