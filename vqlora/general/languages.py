"""Captions in several languages by one model: how a language is asked for, learned and read.

English is asked for as ever, by `<cap>`. The vocabulary holds no names of languages, so another one is asked
for by its own word for "here" behind that: `<bos> <image>.. <emb> <cap> aquí` and a caption in Spanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqlora import metrics, scoring
from vqlora.data.batches import ClipDataset, Collator, Item, Layout, pixels
from vqlora.data.clips import Clip
from vqlora.data.kinemoji.language import parse
from vqlora.evaluate import references_of

ASKED = {"en": "", "es": "aquí", "de": "hier", "fr": "ici", "zh": "这里"}
COLUMNS = ("id", "clip", "task", "kind", "reference", "prediction", "nll", "token_accuracy", "slot", "exact",
           "order")  # fmt: skip
_LANGUAGE = 2  # what a random draw is for, beside those of `vqlora.data.batches`


def asking(layout: Layout, language: str) -> list[int]:
    """Token ids behind the video that ask for a caption in a language. Raises ValueError for another one."""
    if language not in ASKED:
        raise ValueError(f"language: {language!r} is not known; allowed: {', '.join(ASKED)}")
    return [layout.cap, *layout.words(ASKED[language])]


class LanguageCollator(Collator):
    """A `Collator` whose captions, and texts to retrieve by, are in one of `languages`, drawn for each row.

    Questions stay as they are. The draw is a function of (seed, epoch, index), as all others are.
    """

    def __init__(self, tokenizer, languages: Sequence[str], **options) -> None:
        super().__init__(tokenizer, **options)
        self.languages = tuple(languages)
        self.asked = {language: asking(self.layout, language) for language in self.languages}

    def draw(self, item: Item) -> tuple[list[int], list[int], list[int]]:
        rng = np.random.default_rng((self.seed, item.epoch, item.index, _LANGUAGE))
        language = self.languages[int(rng.integers(len(self.languages)))]
        told = {self.language: item.clip.captions.get(language, ())}
        given, learned, text = super().draw(replace(item, clip=replace(item.clip, captions=told)))
        return (self.asked[language] if given[0] == self.layout.cap else given), learned, text


def read_languages(
    model: nn.Module,
    tokenizer,
    clips: Sequence[Clip],
    store,
    languages: Sequence[str],
    *,
    frames: int = 8,
    select: str = "uniform",
    features: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 48,
) -> pd.DataFrame:
    """Captions of the clips in each language: COLUMNS, a row for each clip and language (in `kind`).

    `nll` is nats per token of the references in that language, `<eos>` included, as in `vqlora.evaluate`;
    `slot`, `exact` and `order` are those of the greedy caption, read by Kinemoji's parser of the language. A
    clip goes through the model once for all. Raises ValueError for a clip without captions in one of them.
    """
    clips = [clip for clip in clips if clip.id in store]
    references = {language: references_of(clips, language) for language in languages}
    data = ClipDataset(clips, store, frames, select, features=features)
    layout = Layout(tokenizer, scoring.below(model).config.tokens_per_frame)
    stems = {language: tuple(asking(layout, language)) for language in languages}
    rows: list[dict] = []
    with scoring.scoring_mode(model):
        for start in range(0, len(clips), batch_size):
            batch = clips[start : start + batch_size]
            cache = _encoded(model, layout, [data[start + n] for n in range(len(batch))])
            trees = [[_tree(layout, stems[name], references[name][clip.id]) for name in languages]
                     for clip in batch]  # fmt: skip
            scores = scoring.score(model, cache, trees, layout.pad)
            for place, name in enumerate(languages):
                own = scoring.rows_of(cache, range(len(batch)))
                told = scoring.greedy(model, own, [stems[name]] * len(batch), layout.eos, max_new_tokens)
                texts = tokenizer.batch_decode(told, skip_special_tokens=True)
                texts = [text.replace(" ", "") for text in texts] if name == "zh" else texts
                for clip, text, row in zip(batch, texts, scores, strict=True):
                    rows.append(_row(clip, name, references[name][clip.id], text, row[place]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _encoded(model: nn.Module, layout: Layout, items: Sequence[Item]):
    device = next(model.parameters()).device
    shown = pixels([item.frames for item in items]).to(device)
    times = torch.from_numpy(np.stack([item.times for item in items])).to(device)
    seen = None
    if items[0].features is not None:
        seen = torch.from_numpy(np.stack([item.features for item in items])).to(device)
    return scoring.encode(model, layout.prefix(shown.shape[1]), shown, times, seen)[0]


def _tree(layout: Layout, stem: tuple[int, ...], references: Sequence[str]) -> scoring.Item:
    return scoring.Item(stem, tuple(tuple(layout.caption(text)[1]) for text in references))


def _row(clip: Clip, language: str, references, text: str, scores: Sequence[scoring.Score]) -> dict:
    def read(caption: str):
        return parse(caption, language)

    right = metrics.event_accuracy([text], [read(references[0])], read)
    tokens = sum(s.tokens for s in scores)
    return {
        "id": f"{clip.id}/caption-{language}", "clip": clip.id, "task": "caption", "kind": language,
        "reference": references[0], "prediction": text,
        "nll": float(np.mean([-s.logp / s.tokens for s in scores])),
        "token_accuracy": sum(s.hits for s in scores) / tokens,
        **{name: float(values[0]) for name, values in right.items()},
    }  # fmt: skip
