"""Whole ranks under a budget of trainable parameters: pure functions on costs.

    costs = Costs((Slot("a", "vision", 256, high=64), Slot("b", "text", 704, high=64)))
    uniform(costs, 5_000)                                   # [5, 5]: ranks differ by at most one
    fill(costs, 5_000, proportional([3.0, 1.0]))            # three ranks in "a" for one in "b"
    fill(costs, 5_000, by_gain([[9, 4, 1], [8, 8, 8]], costs))

Glossary: L layers; a worth maps (layer, rank) to what one more rank is worth there. A worth never rises with
the rank, so taking the best rank that still fits, one by one, is the greedy solution of a fractional
knapsack: optimal up to the last rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from math import prod

import numpy as np

Worth = Callable[[int, int], float]
TOLERANCE = 0.01  # of the budget that may stay unspent


@dataclass(frozen=True)
class Slot:
    """A layer that may get ranks from `low` to `high`.

    per_rank: parameters of one rank, d_in + d_out and what a gate adds. once: parameters that come with the
    layer's first rank. modality: layers of one modality share a trunk, see `Costs`, where they are gated.
    """

    name: str
    modality: str
    per_rank: int
    once: int = 0
    low: int = 0
    high: int = 1
    gated: bool = True


@dataclass(frozen=True)
class Costs:
    """What ranks cost: those of the slots, `trunk` for each modality with a gated one, and `fixed` always."""

    slots: tuple[Slot, ...]
    trunk: int = 0
    fixed: int = 0

    @cached_property
    def low(self) -> np.ndarray:
        return np.array([slot.low for slot in self.slots])

    @cached_property
    def high(self) -> np.ndarray:
        return np.array([slot.high for slot in self.slots])

    @cached_property
    def per_rank(self) -> np.ndarray:
        return np.array([slot.per_rank for slot in self.slots])

    @property
    def least(self) -> int:
        """Cost of the cheapest allocation that adapts anything."""
        if self.low.any():
            return self.of(self.low)
        return self.fixed + min(s.per_rank + s.once + self.trunk * s.gated for s in self.slots)

    @property
    def most(self) -> int:
        return self.of(self.high)

    def of(self, ranks: Sequence[int]) -> int:
        """Trainable parameters of these ranks [L]."""
        used = [(slot, int(rank)) for slot, rank in zip(self.slots, ranks, strict=True) if rank]
        layers = sum(slot.per_rank * rank + slot.once for slot, rank in used)
        return self.fixed + layers + self.trunk * len({slot.modality for slot, _ in used if slot.gated})

    def check(self, budget: int) -> None:
        """Raise ValueError for a budget that no ranks can meet."""
        if not self.slots:
            raise ValueError("no layer to give ranks to")
        if budget < self.least:
            raise ValueError(
                f"budget: {budget:,} trainable parameters are too few; the least possible here is "
                f"{self.least:,}"
            )
        if budget - self.most > self.slack(budget):
            raise ValueError(
                f"budget: {budget:,} trainable parameters are more than these layers can hold; the most "
                f"possible here is {self.most:,}"
            )

    def slack(self, budget: int) -> float:
        """What may stay unspent: 1% of the budget or one rank of the cheapest layer."""
        return max(TOLERANCE * budget, float(self.per_rank.min()))


def uniform(costs: Costs, budget: int) -> np.ndarray:
    """Ranks [L] that differ by at most one, bounds aside; the wider layers get the higher one.

    Spends as much of the budget as such ranks can.
    """
    costs.check(budget)

    def level(rank: int) -> np.ndarray:
        return np.clip(rank, costs.low, costs.high)

    rank = 0
    while rank < costs.high.max() and costs.of(level(rank + 1)) <= budget:
        rank += 1
    low, high = level(rank), level(rank + 1)
    ranks = _fill(costs, budget, low.copy(), high, lambda layer, rank: costs.slots[layer].per_rank)
    return _tighten(costs, budget, ranks, low, high)


def fill(costs: Costs, budget: int, worth: Worth) -> np.ndarray:
    """Ranks [L]: the most valuable rank that still fits, again and again, until none does."""
    costs.check(budget)
    ranks = _fill(costs, budget, costs.low.copy(), costs.high, worth)
    return _tighten(costs, budget, ranks, costs.low, costs.high)


def proportional(weights: Sequence[float]) -> Worth:
    """Ranks in proportion to `weights` [L]: the divisor method of D'Hondt, as with seats and votes."""
    weights = [float(weight) for weight in weights]
    return lambda layer, rank: weights[layer] / (rank + 1)


def by_gain(gains: Sequence[Sequence[float]], costs: Costs) -> Worth:
    """Gain per parameter, from the gain of each further rank of each layer; 0 past the end of its list."""
    gains, prices = [list(map(float, gain)) for gain in gains], costs.per_rank.tolist()
    return lambda layer, rank: gains[layer][rank] / prices[layer] if rank < len(gains[layer]) else 0.0


def combined(worths: Sequence[Worth]) -> Worth:
    """The geometric mean of several worths: a scale that one of them has does not matter."""
    return lambda layer, rank: prod(worth(layer, rank) ** (1 / len(worths)) for worth in worths)


def _fill(costs: Costs, budget: int, ranks: np.ndarray, high: np.ndarray, worth: Worth) -> np.ndarray:
    left = budget - costs.of(ranks)
    opened = {slot.modality for slot, rank in zip(costs.slots, ranks, strict=True) if rank}
    queue = [(-worth(i, int(r)), int(r), i) for i, r in enumerate(ranks) if r < high[i]]
    heapify(queue)  # among equals the layer with the fewest ranks, then the first
    waiting = []  # too dear, unless another layer pays for their modality's trunk
    while queue:
        place = heappop(queue)
        _, rank, layer = place
        slot = costs.slots[layer]
        first = slot.gated and slot.modality not in opened
        price = slot.per_rank + (0 if rank else slot.once) + (costs.trunk if first else 0)
        if price > left:
            waiting.append(place)
            continue
        ranks[layer] += 1
        left -= price
        if rank + 1 < high[layer]:
            heappush(queue, (-worth(layer, rank + 1), rank + 1, layer))
        if first and costs.trunk:
            opened.add(slot.modality)
            for place in waiting:
                heappush(queue, place)
            waiting.clear()
    return ranks


def _tighten(costs: Costs, budget: int, ranks, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Move single ranks to dearer layers while too much is left: bounds may allow no cheap rank to add."""
    while (left := budget - costs.of(ranks)) > costs.slack(budget):
        spare, room = np.flatnonzero(ranks > low), np.flatnonzero(ranks < high)
        more = costs.per_rank[room][None] - costs.per_rank[spare][:, None]
        more = np.where(more <= left, more, 0)
        for place in np.argsort(-more, axis=None, kind="stable")[: np.count_nonzero(more > 0)]:
            source, target = np.unravel_index(place, more.shape)
            moved = ranks.copy()
            moved[spare[source]] -= 1
            moved[room[target]] += 1
            if budget - left < costs.of(moved) <= budget:  # first ranks cost more than others
                ranks = moved
                break
        else:
            return ranks
    return ranks
