"""A model that is tiny and random, yet tells clips apart and ends some of its captions."""

import torch

from vqlora.base import tiny

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<emb>", "<cap>", "<qst>", "<ans>")


def lively(seed=0):
    """(model, tokenizer) with weights large enough to matter; it seldom tells special tokens."""
    model, tokenizer = tiny(seed)
    rng = torch.Generator().manual_seed(seed)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL if token != "<eos>"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5)
        model.get_input_embeddings().weight[ids] *= 0.1
    return model, tokenizer
