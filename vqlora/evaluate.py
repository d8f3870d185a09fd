"""Evaluate a model on clips: captions, likelihoods of references, questions, retrieval; keep every example.

    result = evaluate(model, tokenizer, clips, store, frames=8)
    result.summary["cider"], result.summary["qa_frac"], result.examples.query("task == 'question'")

A clip's frames go through the model once (`vqlora.scoring`); plain, peft-wrapped and 4-bit models work alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from vqlora import metrics, scoring
from vqlora.data.batches import ClipDataset, Item, Layout, pixels
from vqlora.data.clips import Clip, Question
from vqlora.metrics import metric_values as metric_values

Parser = Callable[[str], Sequence[tuple[str, str]]]
TEXT_COLUMNS = ("id", "clip", "task", "kind", "prompt", "reference", "prediction")
WORDS = 5000  # a vocabulary of fewer has whole words, or so few pieces that METEOR finds its way back
HELD_BYTES = 2**28  # caches of batches that wait to be captioned together
NUMBER_COLUMNS = (
    "nll", "token_accuracy", "correct", "rank", "slot", "exact", "order", *metrics.EXAMPLE_METRICS
)


@dataclass(frozen=True)
class Evaluation:
    """`summary`: one float per metric. `examples`: one row per clip and item, columns TEXT_COLUMNS (strings)
    and NUMBER_COLUMNS (floats, NaN where one does not apply).

    - task "caption", one row a clip: `nll` is nats per token, `<eos>` included, mean over the references;
      `reference` is the first of them.
    - task "question": `kind` is the question's, `nll` is nats of the right choice, `rank` its rank among all.
    - task "retrieval": `kind` is "t2v" or "v2t", `rank` that of the right item, `prediction` the first clip.
    """

    summary: dict[str, float]
    examples: pd.DataFrame


def evaluate(
    model: nn.Module,
    tokenizer,
    clips: Sequence[Clip],
    store,
    *,
    frames: int = 8,
    select: str | Callable = "uniform",
    batch_size: int = 64,
    language: str = "en",
    max_new_tokens: int = 48,
    parser: Parser | None = None,
    scorer: metrics.CaptionScorer | None = None,
    blind: bool = False,
    features: bool = False,
) -> Evaluation:
    """Score `model` on those of `clips` whose decoded frames are in `store` (uint8 [T, H, W, 3] by clip id).

    The others are counted as `clips_left_out`: hand in all clips of a part, readable or not.

    select: a policy of `vqlora.frames.select`, by name or as a function. parser: caption -> (object, motion)
    pairs, for slot, exact and order accuracy against what the first reference tells; default: Kinemoji's
    where clips carry true events. scorer: reference metrics; default: the one of this process, which keeps
    METEOR open for the next call. blind: each clip gets the frames of another one, which shows what the model
    knows without seeing. features: the model's gates read `frame_features`, which the frames' scores make.
    Raises ValueError for no readable clip, or a clip without captions in `language` beside others with some.
    """
    asked, clips = len(clips), [clip for clip in clips if clip.id in store]
    gone = asked - len(clips)
    if len(clips) < 1 + blind:
        raise ValueError(f"evaluation{' of blind models' * blind} needs at least {1 + blind} readable clips, "
                         f"got {len(clips)} ({gone} left out)")
    references = references_of(clips, language)
    if parser is None and references and all(clip.events is not None for clip in clips):
        from vqlora.data.kinemoji.language import parse

        parser = partial(parse, language=language)
    shown = clips[len(clips) // 2 :] + clips[: len(clips) // 2] if blind else clips
    data = ClipDataset(shown, store, frames, select, features=features)
    reader = Reader(model, tokenizer, data, language, max_new_tokens)
    with scoring.scoring_mode(model):
        said = reader.ask(clips, references, batch_size)
        reader.embed(clips, references, said)
    parts = [_question_rows(clips, said)]
    if references:
        scorer = scorer or metrics.shared_scorer(language, _words(tokenizer))
        captions = _caption_rows(clips, references, said, parser, scorer)
        parts = [captions, *parts, _retrieval_rows(clips, references, said)]
    rows = [row for found, _ in parts for row in found]
    summary = {name: value for _, means in parts for name, value in means.items()}
    summary |= {"clips": float(len(clips)), "clips_left_out": float(gone)}
    table = pd.DataFrame(rows, columns=[*TEXT_COLUMNS, *NUMBER_COLUMNS])
    types = dict.fromkeys(TEXT_COLUMNS, str) | dict.fromkeys(NUMBER_COLUMNS, float)
    return Evaluation(summary, table.astype(types))


def _words(tokenizer) -> frozenset[str]:
    """All that captions can be made of, by a tokenizer of whole words; nothing for one of pieces."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(vocabulary) if len(vocabulary) <= WORDS else frozenset()


def references_of(clips: Sequence[Clip], language: str) -> dict[str, tuple[str, ...]]:
    """Reference captions by clip id; empty if no clip has any caption."""
    if not any(clip.captions for clip in clips):
        return {}
    for clip in clips:
        if not clip.captions.get(language):
            has = ", ".join(sorted(clip.captions)) or "none"
            raise ValueError(f"clip {clip.id!r} has no captions in language {language!r}; it has: {has}")
    return {clip.id: tuple(clip.captions[language]) for clip in clips}


@dataclass
class _Said:
    """What the model said of one clip."""

    caption: str = ""
    references: Sequence[scoring.Score] = ()
    choices: Sequence[Sequence[scoring.Score]] = ()  # per question
    answers: Sequence[str | None] = ()  # per question; None where it has choices
    video: np.ndarray | None = None
    text: np.ndarray | None = None


class Reader:
    """Puts every question to the model; `data[k]` is what is shown for clip k."""

    def __init__(self, model, tokenizer, data: Sequence[Item], language: str, max_new_tokens: int) -> None:
        self.model, self.data, self.language, self.max_new_tokens = model, data, language, max_new_tokens
        self.layout = Layout(tokenizer, scoring.below(model).config.tokens_per_frame)
        self.device = next(model.parameters()).device

    def ask(self, clips: Sequence[Clip], references, batch_size: int) -> list[_Said]:
        """What the model says of each clip, in their order. `references` by clip id, or empty."""
        items = [self._items(clip, references.get(clip.id, ())) for clip in clips]
        order = sorted(range(len(clips)), key=lambda k: sum(item.length for item in items[k]))
        said, waiting = [_Said() for _ in clips], []
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            cache, vectors = self._encode(batch)
            scores = scoring.score(self.model, cache, [items[k] for k in batch], self.layout.pad)
            for k, row, vector in zip(batch, scores, vectors, strict=True):
                said[k].video = vector
                said[k].references, said[k].choices = (row[0], row[1:]) if references else ((), row)
            self._answer(cache, *([rows[k] for k in batch] for rows in (clips, items, said)))
            if references:
                waiting.append(([said[k] for k in batch], cache))
                held_bytes = sum(scoring.cache_bytes(cache) for _, cache in waiting)
                if held_bytes > HELD_BYTES or batch[-1] == order[-1]:
                    self._caption(waiting)
                    waiting = []
        return said

    def embed(self, clips: Sequence[Clip], references, said: Sequence[_Said]) -> None:
        """Set the text vector of each clip, that of its first reference."""
        if references:
            rows = [self.layout.text(references[clip.id][0]) for clip in clips]
            vectors = scoring.embed_texts(self.model, rows, self.layout.pad).float().cpu().numpy()
            for one, vector in zip(said, vectors, strict=True):
                one.text = vector

    def _caption(self, waiting: Sequence[tuple[Sequence[_Said], object]]) -> None:
        """Caption several batches at once: a step costs nearly as much for few rows as for many."""
        rows = [one for batch, _ in waiting for one in batch]
        cache = scoring.join([cache for _, cache in waiting])
        for one, caption in zip(rows, self._decode(cache, [(self.layout.cap,)] * len(rows)), strict=True):
            one.caption = caption

    def _items(self, clip: Clip, references: Sequence[str]) -> list[scoring.Item]:
        """The clip's text as trees: all references behind `<cap>`, then each question with its choices.

        Choices are compared by summed log-likelihood: that of answering just so, which is what was trained. A
        mean per token would favour long choices whose later words follow from the first. `<eos>` counts, else
        a choice that begins another could not lose to it; where all choices are one token it is left out.
        """
        items = []
        if references:
            rows = [self.layout.caption(text) for text in references]
            items.append(scoring.Item(tuple(rows[0][0]), tuple(tuple(learned) for _, learned in rows)))
        for question in clip.questions:
            rows = [self.layout.question(question.text, choice) for choice in question.choices]
            short = len(rows) > 1 and all(len(learned) == 2 for _, learned in rows)
            branches = tuple(tuple(learned[:1] if short else learned) for _, learned in rows)
            items.append(scoring.Item(tuple(rows[0][0]), branches))
        return items

    def _encode(self, batch: Sequence[int]):
        shown = [self.data[k] for k in batch]
        frames = pixels([item.frames for item in shown]).to(self.device)
        times = torch.from_numpy(np.stack([item.times for item in shown])).to(self.device)
        scores = None
        if shown[0].features is not None:
            scores = torch.from_numpy(np.stack([item.features for item in shown])).to(self.device)
        sound = None
        if shown[0].sound is not None:
            sound = torch.from_numpy(np.stack([item.sound for item in shown])).to(self.device)
        prefix = self.layout.prefix(frames.shape[1], 0 if sound is None else sound.shape[1])
        cache, vectors = scoring.encode(self.model, prefix, frames, times, scores, sound)
        return cache, vectors.float().cpu().numpy()

    def _decode(self, cache, stems) -> list[str]:
        told = scoring.greedy(self.model, cache, stems, self.layout.eos, self.max_new_tokens)
        texts = self.layout.tokenizer.batch_decode(told, skip_special_tokens=True)
        return [text.replace(" ", "") for text in texts] if self.language == "zh" else texts

    def _answer(self, cache, clips, items, said) -> None:
        """Answer open questions (one choice: the right answer) by greedy decoding."""
        rows, stems, where = [], [], []
        for row, (clip, trees, one) in enumerate(zip(clips, items, said, strict=True)):
            one.answers = [None] * len(clip.questions)
            for q, question in enumerate(clip.questions):
                if len(question.choices) == 1:
                    rows.append(row)
                    stems.append(trees[q - len(clip.questions)].stem)
                    where.append((one, q))
        if rows:
            for (one, q), text in zip(where, self._decode(scoring.rows_of(cache, rows), stems), strict=True):
                one.answers[q] = text


def _caption_rows(clips, references, said, parser, scorer) -> tuple[list[dict], dict[str, float]]:
    scores = scorer.score({clip.id: one.caption for clip, one in zip(clips, said, strict=True)}, references)
    each, summary = dict(scores.examples), dict(scores.corpus)
    each["nll"] = np.array([np.mean([-s.logp / s.tokens for s in one.references]) for one in said])
    hits = [(sum(s.hits for s in one.references), sum(s.tokens for s in one.references)) for one in said]
    each["token_accuracy"] = np.array([hit / count for hit, count in hits])
    if parser is not None:
        truths = [parser(references[clip.id][0]) for clip in clips]
        each |= metrics.event_accuracy([one.caption for one in said], truths, parser)
    for name, column in metrics.CAPTION_MEANS.items():
        if column in each and name not in summary:
            values = each[column][~np.isnan(each[column])] if column == "order" else each[column]
            summary[name] = float(values.mean()) if len(values) else math.nan
    rows = []
    for k, (clip, one) in enumerate(zip(clips, said, strict=True)):
        texts = {"reference": references[clip.id][0], "prediction": one.caption, "prompt": "", "kind": ""}
        numbers = {name: values[k] for name, values in each.items()}
        rows.append({"id": f"{clip.id}/caption", "clip": clip.id, "task": "caption", **texts, **numbers})
    return rows, summary


def _question_rows(clips, said) -> tuple[list[dict], dict[str, float]]:
    rows, right = [], {}
    for clip, one in zip(clips, said, strict=True):
        for q, (question, scores) in enumerate(zip(clip.questions, one.choices, strict=True)):
            rank, prediction = _judge(question, scores, one.answers[q])
            texts = {"prompt": question.text, "reference": question.choices[question.answer]}
            texts |= {"kind": question.kind, "prediction": prediction}
            numbers = {"nll": -scores[question.answer].logp, "correct": float(rank == 1), "rank": rank}
            ident = {"id": f"{clip.id}/question-{q}", "clip": clip.id, "task": "question"}
            rows.append({**ident, **texts, **numbers})
            for name in ("qa_frac", f"qa_{question.kind}_frac"):
                right.setdefault(name, []).append(numbers["correct"])
    return rows, {name: float(np.mean(values)) for name, values in right.items()}


def _judge(question: Question, scores: Sequence[scoring.Score], answer: str | None) -> tuple[float, str]:
    """(rank of the right choice, what was answered); ties, and NaN, count against us."""
    if answer is not None:
        same = answer.lower().split() == question.choices[question.answer].lower().split()
        return (1.0 if same else math.nan), answer
    logp = np.array([s.logp for s in scores])
    rivals = [k for k in range(len(logp)) if k != question.answer and not logp[k] < logp[question.answer]]
    return 1.0 + len(rivals), question.choices[max(rivals, key=lambda k: logp[k], default=question.answer)]


def _retrieval_rows(clips, references, said) -> tuple[list[dict], dict[str, float]]:
    text, video = np.stack([one.text for one in said]), np.stack([one.video for one in said])
    similarity = text.astype(np.float64) @ video.astype(np.float64).T
    rows = []
    for way, matrix in (("t2v", similarity), ("v2t", similarity.T)):
        ranks, first = metrics.retrieval_ranks(matrix), matrix.argmax(axis=1)
        for k, clip in enumerate(clips):
            texts = {"reference": references[clip.id][0], "prediction": clips[first[k]].id, "prompt": ""}
            numbers = {"correct": float(ranks[k] == 1), "rank": ranks[k]}
            ident = {"id": f"{clip.id}/{way}", "clip": clip.id, "task": "retrieval", "kind": way}
            rows.append({**ident, **texts, **numbers})
    return rows, metrics.retrieval(text, video)
