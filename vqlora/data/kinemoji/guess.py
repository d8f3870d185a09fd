"""How far the text of a question alone gives its answer away: a learned guesser that never sees a frame.

A conditional logit over the choices of a question. Its features are the choice itself, every question word
and the whole question with the choice, the choice's position, and each other choice beside it, so it finds an
uneven prior, a telling word, a favoured position and an odd one out. Trained on one part, tested on another.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from ..clips import Question

PENALTIES = (1.0, 5.0, 25.0, 125.0)  # L2 weight; chosen on a held-out fifth of the training questions


def text_only_guess(train: Sequence[Question], test: Sequence[Question]) -> pd.DataFrame:
    """Accuracy of the text-only guesser per kind and over "all", against chance.

    Returns columns kind, questions, chance_frac (mean of 1 / number of choices), guess_frac,
    over_chance_frac and error_frac (standard error of guess_frac). Raises ValueError if a side is empty.
    """
    if not train or not test:
        raise ValueError(f"text_only_guess: {len(train)} train, {len(test)} test questions; both need some")
    hits = np.zeros(len(test))
    kinds = np.array([q.kind for q in test])
    for kind in dict.fromkeys(kinds):
        own = [q for q in train if q.kind == kind]
        where = np.flatnonzero(kinds == kind)
        hits[where] = _fit_and_guess(own, [test[i] for i in where])
    chance = np.array([1 / len(q.choices) for q in test])
    rows = []
    for kind in [*sorted(set(kinds)), "all"]:
        mask = kinds == kind if kind != "all" else np.ones(len(test), bool)
        accuracy = hits[mask].mean()
        rows.append({
            "kind": kind, "questions": int(mask.sum()),
            "chance_frac": chance[mask].mean(), "guess_frac": accuracy,
            "over_chance_frac": accuracy - chance[mask].mean(),
            "error_frac": np.sqrt(accuracy * (1 - accuracy) / mask.sum()),
        })
    return pd.DataFrame(rows)


def _fit_and_guess(train: list[Question], test: list[Question]) -> np.ndarray:
    """1.0 where the guess is right, per test question."""
    if not train:
        return np.array([float(q.answer == 0) for q in test])
    names: dict[str, int] = {}
    design = _design(train, names, grow=True)
    cut = max(1, len(train) * 4 // 5)
    inner, outer = _design(train[:cut], names), _design(train[cut:] or train, names)
    held_out = [_loss(_fit(inner, len(names), p), outer, 0.0)[0] for p in PENALTIES]
    weights = _fit(design, len(names), PENALTIES[int(np.argmin(held_out))])
    features, group, _ = _design(test, names)
    scores = np.split(features @ weights, np.flatnonzero(np.diff(group)) + 1)
    return np.array([float(np.argmax(s) == q.answer) for s, q in zip(scores, test, strict=True)])


def _design(questions, names: dict[str, int], grow: bool = False):
    """Sparse features [choices, features], each choice row's question number, and each answer's row."""
    columns, starts, group, right = [], [0], [], []
    for number, question in enumerate(questions):
        right.append(len(group) + question.answer)
        for position, choice in enumerate(question.choices):
            keys = [f"c {choice}", f"p {position}", f"q {question.text} {choice}"]
            keys += [f"w {word} {choice}" for word in question.text.split()]
            keys += [f"o {other} {choice}" for other in question.choices if other != choice]
            if grow:
                for key in keys:
                    names.setdefault(key, len(names))
            columns += [names[key] for key in keys if key in names]
            starts.append(len(columns))
            group.append(number)
    shape = (len(group), len(names))
    features = csr_matrix((np.ones(len(columns)), np.array(columns, int), np.array(starts)), shape=shape)
    return features, np.array(group), np.array(right)


def _loss(weights, design, penalty: float):
    """Mean negative log-likelihood plus penalty, and its gradient."""
    features, group, right = design
    scores = features @ weights
    top = np.full(len(right), -np.inf)
    np.maximum.at(top, group, scores)
    powers = np.exp(scores - top[group])
    sums = np.bincount(group, powers, len(right))
    loss = np.mean(np.log(sums) + top - scores[right]) + penalty / 2 * weights @ weights / len(right)
    slope = powers / sums[group]
    slope[right] -= 1
    return loss, (features.T @ slope + penalty * weights) / len(right)


def _fit(design, size: int, penalty: float) -> np.ndarray:
    found = minimize(_loss, np.zeros(size), (design, penalty), "L-BFGS-B", jac=True, options={"maxiter": 100})
    return found.x
