"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190) of the text decoder, by peft.

In every decoder layer, P trained keys and values come before those of the clip and its text; `settings.rank`
is P. The rows keep their order and move P positions on, in training as in evaluation: the cache that a clip
leaves already begins with the prefix, so what is scored behind it (`vqlora.scoring`) sees it once.

The keys and values themselves are trained, not the paper's reparametrization by an MLP: of that a checkpoint
keeps only the outcome, and a killed run could not go on. They begin as the activations of real words (the
paper's section 7.4). peft hands them over in the dtype that the base is stored in.
"""

from __future__ import annotations

import torch
from peft import PrefixTuningConfig
from torch import Tensor, nn

IGNORED = -100  # label of a token that is not learned


def configure(model: nn.Module, settings, batches) -> PrefixTuningConfig:
    """peft's config of a prefix of `settings.rank` positions.

    Raises ValueError for any model but the embedded one, whose positions follow from the length of the cache;
    for modalities without the text decoder; and without batches to take the first words from.
    """
    if model.config.model_type != "kinevlm":
        raise ValueError(f"arm: 'prefix' does not go with model type {model.config.model_type!r}; "
                         "allowed: kinevlm, the embedded base")  # fmt: skip
    if "text" not in settings.modalities:
        raise ValueError(f"modalities: {settings.modalities} lacks 'text', the only part with a prefix")
    if batches is None:
        raise ValueError("arm 'prefix' starts from words of training batches, and none are given")
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.rank)


def begin(model: nn.Module, settings, batches) -> None:
    """Start the prefix as what the decoder makes of the first words that the run would learn."""
    words = torch.cat([batch["input_ids"][batch["labels"] != IGNORED] for batch in batches()])
    repeats = -(-settings.rank // len(words))
    table = keys_and_values(model.get_base_model(), words.repeat(repeats)[: settings.rank])
    model.prompt_encoder["default"].load_prompt_embeddings(table)


def keys_and_values(base: nn.Module, words: Tensor) -> Tensor:
    """Keys and values of the tokens `words` [P] at positions 0 to P - 1, in peft's order.

    Returns float32 [P, 2 · layers · heads · head_dim]: of each layer its keys, then its values.
    """
    with torch.no_grad():
        cache = base(input_ids=words[None], use_cache=True).past_key_values
    rows = [side[0] for layer in cache.layers for side in (layer.keys, layer.values)]  # each [heads, P, dim]
    return torch.stack(rows).permute(2, 0, 1, 3).flatten(1).float()
