"""What fine-tuning minimises: cross-entropy of texts, and the contrast of clips with their captions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vqlora import processes

CONTRASTIVE_SCALE = 12.0  # inverse temperature, about what the base was pretrained with


def batch_loss(
    model: nn.Module, batch: Mapping[str, Tensor], contrastive_weight: float, *, shared: bool = False
) -> tuple[Tensor, object]:
    """Cross-entropy of captions and answers, plus `contrastive_weight` times symmetric InfoNCE.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) contrasts the batch's B video vectors with the
    vectors of their reference captions (`text_ids`, `text_mask` [B, Lt]). Other keys of `batch` go to the
    model.

    shared: `batch` is this process's share of one. The mean over processes, of losses and as DDP takes it of
    gradients, is then that of the whole batch: a share counts by the tokens it teaches, and every clip is
    contrasted with those of all processes.
    """
    batch = dict(batch)
    text_ids, text_mask = batch.pop("text_ids", None), batch.pop("text_mask", None)
    outputs = model(**batch, use_cache=False)
    loss = outputs.loss
    others = processes.count() if shared else 1
    if others > 1:
        learned = (batch["labels"][..., 1:] != -100).sum()
        loss = loss * (learned * others / processes.total(learned))
    if contrastive_weight and text_ids is not None and len(text_ids) * others > 1:
        # DDP counts the forwards it wraps: the second one of a step goes past it, to the same parameters.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        text = inner(input_ids=text_ids, attention_mask=text_mask, use_cache=False, logits_to_keep=1)
        video_vectors = inner.embed(outputs.last_hidden_state, batch["input_ids"])
        text_vectors = inner.embed(text.last_hidden_state, text_ids)
        if others > 1:
            video_vectors, text_vectors = map(processes.gathered, (video_vectors, text_vectors))
        loss = loss + contrastive_weight * info_nce(video_vectors, text_vectors)
    return loss, outputs


def info_nce(video: Tensor, text: Tensor, scale: float = CONTRASTIVE_SCALE) -> Tensor:
    """Mean of both directions' cross-entropy of matching `video` and `text` [B, E], rows L2-normalised."""
    logits, target = scale * video @ text.T, torch.arange(len(video), device=video.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
