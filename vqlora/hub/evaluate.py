"""Score a checkpoint of the hub on clips: captions, likelihoods of references, questions; every example kept.

The same tables as `vqlora.evaluate`, without retrieval, for which these classes have no vectors. Each text is
scored in a row of its own, and every row shows its clip again: dear beside the embedded base, whose cached
clips need an inside that not every class has.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from torch import nn

from vqlora import metrics, scoring
from vqlora.data.batches import ClipDataset
from vqlora.data.clips import Clip
from vqlora.evaluate import (
    NUMBER_COLUMNS,
    TEXT_COLUMNS,
    Evaluation,
    _caption_rows,
    _question_rows,
    _Said,
    references_of,
)
from vqlora.hub.batches import HubCollator


def evaluate_hub(
    model: nn.Module,
    collator: HubCollator,
    clips: Sequence[Clip],
    store,
    *,
    frames: int = 8,
    select: str = "uniform",
    features: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 48,
    scorer: metrics.CaptionScorer | None = None,
) -> Evaluation:
    """Score `model` on those of `clips` whose frames are in `store`; the others are counted.

    collator: makes rows as in training. Raises ValueError for no readable clip, or a clip without captions in
    the collator's language beside others with some.
    """
    asked, clips = len(clips), [clip for clip in clips if clip.id in store and clip.id in collator.seconds]
    if not clips:
        raise ValueError(f"evaluation needs at least 1 readable clip, got 0 ({asked} left out)")
    references = references_of(clips, collator.language)
    data = ClipDataset(clips, store, frames, select, features=features)
    reader = _Reader(model, collator, batch_size, max_new_tokens)
    said = [_Said() for _ in clips]
    with scoring.scoring_mode(model):
        for k, clip in enumerate(clips):
            said[k].references = reader.score(
                data[k], [collator.layout.caption(text) for text in references.get(clip.id, ())]
            )
            said[k].choices = [
                reader.score(data[k], [(q.text, choice) for choice in q.choices]) for q in clip.questions
            ]
            said[k].answers = [
                reader.say([(data[k], q.text)])[0] if len(q.choices) == 1 else None for q in clip.questions
            ]
        if references:
            for first in range(0, len(clips), batch_size):
                some = range(first, min(first + batch_size, len(clips)))
                told = reader.say([(data[k], collator.prompts.request) for k in some])
                for k, caption in zip(some, told, strict=True):
                    said[k].caption = caption
    parts = [_question_rows(clips, said)]
    if references:
        scorer = scorer or metrics.shared_scorer(collator.language)
        parts = [_caption_rows(clips, references, said, None, scorer), *parts]
    summary = {name: value for _, means in parts for name, value in means.items()}
    summary |= {"clips": float(len(clips)), "clips_left_out": float(asked - len(clips))}
    rows = [row for found, _ in parts for row in found]
    table = pd.DataFrame(rows, columns=[*TEXT_COLUMNS, *NUMBER_COLUMNS])
    types = dict.fromkeys(TEXT_COLUMNS, str) | dict.fromkeys(NUMBER_COLUMNS, float)
    return Evaluation(summary, table.astype(types))


class _Reader:
    """Puts requests to the model. Rows are padded on the left, so that answers end together."""

    def __init__(self, model: nn.Module, collator: HubCollator, batch_size: int, max_new_tokens: int):
        self.model, self.collator, self.batch_size = model, collator, batch_size
        self.max_new_tokens, self.device = max_new_tokens, next(model.parameters()).device

    def score(self, item, texts: Sequence[tuple[str, str]]) -> list[scoring.Score]:
        """Of each (request, answer): its likelihood, the token that ends it included."""
        found = []
        for first in range(0, len(texts), self.batch_size):
            some = [(item, *pair) for pair in texts[first : first + self.batch_size]]
            batch = self._moved(self.collator.rows(some, left=True))
            labels = batch.pop("labels")
            longest = int((labels != -100).sum(1).max())
            logits = self.model(**batch, use_cache=False, logits_to_keep=longest + 1).logits
            logits, wanted = logits[:, -longest - 1 : -1].float(), labels[:, -longest:]
            logp = torch.log_softmax(logits, -1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
            hits = logits.argmax(-1) == wanted
            for row, learned in enumerate(wanted != -100):
                total = float(logp[row][learned].double().sum())
                found.append(scoring.Score(total, int(hits[row][learned].sum()), int(learned.sum())))
        return found

    def say(self, asked: Sequence[tuple]) -> list[str]:
        """The model's answer to each (item, request), greedily."""
        batch = self._moved(self.collator.rows([(*pair, "") for pair in asked], left=True, learned=False))
        del batch["labels"]
        features, checkpoint = batch.pop("frame_features", None), self.collator.checkpoint
        how = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": checkpoint.pad,
            "eos_token_id": self._ends(asked[0][0]),
        }
        with _shown(self.model, features):
            told = self.model.generate(**batch, **how)
        told = told[:, batch["input_ids"].shape[1] :]
        texts = checkpoint.tokenizer.batch_decode(told, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _ends(self, item) -> list[int]:
        """Ids that end an answer: those of the checkpoint, and the one that rows were taught to end with."""
        prompts = self.collator.prompts
        _, learned = prompts.row(self.collator.see(item)[1], prompts.request, "x")
        return sorted({*self.collator.checkpoint.ends, learned[-1]})

    def _moved(self, batch: dict) -> dict:
        return {key: value.to(self.device) for key, value in batch.items()}


def _shown(model: nn.Module, features):
    """Around `generate`, which takes no arguments of its own: what gates read."""
    if features is None:
        return nullcontext()
    # by name: arms without gates do not depend on their code
    return importlib.import_module("vqlora.adapter").frame_features(model, features)
