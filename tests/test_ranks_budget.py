"""Whole ranks under a budget: never above it, hardly below, bounds kept, the order of worth obeyed."""

import numpy as np
import pytest

from vqlora.ranks.budget import Costs, Slot, by_gain, combined, fill, proportional, uniform


def random_costs(rng, *, gates=False, bounds=False):
    """Layers of a random architecture: a few widths, as real ones have, two of them to a layer."""
    unit = int(rng.choice([1, 8, 64]))
    widths = unit * rng.integers(1, max(2, 2048 // unit), size=4)
    slots = []
    for i in range(int(rng.integers(1, 60))):
        d_in, d_out = (int(width) for width in rng.choice(widths, 2))
        high = min(d_in, d_out)
        if bounds and rng.random() < 0.3:
            high = min(high, int(rng.integers(1, 9)))
        low = int(rng.integers(0, 2)) if bounds else 0
        gate, once = (5, 5) if gates else (0, 0)
        part = str(rng.choice(["vision", "fusion", "text"]))
        slots.append(Slot(f"layer{i}", part, d_in + d_out + gate, once, low, high))
    return Costs(tuple(slots), trunk=28 if gates else 0)


def budget_for(costs, rng):
    return int(rng.integers(costs.least, costs.of(np.minimum(costs.high, 24)) + 1))


def random_worths(costs, rng):
    gains = [np.sort(rng.exponential(size=min(slot.high, 32)))[::-1] for slot in costs.slots]
    weights = proportional(rng.random(len(costs.slots)))
    return weights, by_gain(gains, costs), combined([weights, by_gain(gains, costs)])


def test_budget_error_over_200_random_architectures():
    rng, worst = np.random.default_rng(5), 0.0
    for _ in range(200):
        costs = random_costs(rng)
        budget = budget_for(costs, rng)
        for worth in random_worths(costs, rng):
            ranks = fill(costs, budget, worth)
            missed = budget - costs.of(ranks)
            assert ranks.dtype.kind == "i" and (ranks >= 0).all() and (ranks <= costs.high).all()
            assert 0 <= missed <= max(0.01 * budget, costs.per_rank.min())
            worst = max(worst, missed / max(0.01 * budget, costs.per_rank.min()))
        even = uniform(costs, budget)
        assert costs.of(even) <= budget
        free = even < costs.high
        assert not free.any() or even[free].min() >= even.max() - 1
    assert worst > 0.1  # the bound is not met by luck of tiny budgets


def test_gates_and_bounds_count():
    rng = np.random.default_rng(6)
    for _ in range(100):
        costs = random_costs(rng, gates=True, bounds=True)
        budget = budget_for(costs, rng)
        for ranks in (uniform(costs, budget), *(fill(costs, budget, w) for w in random_worths(costs, rng))):
            assert (ranks >= costs.low).all() and (ranks <= costs.high).all()
            assert costs.of(ranks) <= budget


def test_uniform_ranks_spend_what_ranks_that_differ_by_one_can():
    rng = np.random.default_rng(7)
    within = 0
    for _ in range(200):
        costs = random_costs(rng)
        budget = budget_for(costs, rng)
        within += budget - costs.of(uniform(costs, budget)) <= costs.slack(budget)
    assert within >= 190  # a single wide layer among narrow ones cannot always be met


def test_costs_by_hand():
    costs = Costs((Slot("a", "vision", 10, once=3), Slot("b", "vision", 20), Slot("c", "text", 40)), 7, 100)
    assert costs.of([0, 0, 0]) == 100
    assert costs.of([2, 1, 0]) == 100 + 7 + 20 + 3 + 20
    assert costs.of([0, 0, 1]) == 100 + 7 + 40
    assert costs.least == 100 + 7 + 13
    assert costs.most == costs.of([1, 1, 1]) == 100 + 14 + 73


def test_budgets_that_cannot_be_met_are_told_with_what_can():
    costs = Costs((Slot("a", "vision", 10, high=4), Slot("b", "text", 30, high=4)))
    with pytest.raises(ValueError, match="budget: 9 .*too few; the least possible here is 10"):
        fill(costs, 9, proportional([1, 1]))
    with pytest.raises(ValueError, match="budget: 500 .*most possible here is 160"):
        uniform(costs, 500)
    bound = Costs((Slot("a", "vision", 10, low=2, high=4), Slot("b", "text", 30, high=4)))
    with pytest.raises(ValueError, match="least possible here is 20"):
        uniform(bound, 15)


def test_proportional_ranks_are_in_proportion():
    costs = Costs(tuple(Slot(str(i), "text", 100, high=64) for i in range(3)))
    assert fill(costs, 1_600, proportional([4, 2, 2])).tolist() == [8, 4, 4]
    assert uniform(costs, 1_600).tolist() in ([6, 5, 5], [5, 6, 5], [5, 5, 6])
    assert fill(costs, 1_600, proportional([1, 0, 0])).tolist() == [16, 0, 0]


def test_gain_per_parameter_decides():
    costs = Costs((Slot("narrow", "text", 10, high=4), Slot("wide", "text", 40, high=4)))
    worth = by_gain([[8, 2, 0.5, 0.1], [30, 9, 4, 0.1]], costs)  # per parameter .8 .2 .05 / .75 .22 .1
    assert fill(costs, 50, worth).tolist() == [1, 1]
    assert fill(costs, 90, worth).tolist() == [1, 2]
    assert fill(costs, 100, worth).tolist() == [2, 2]


def test_greedy_gain_equals_the_best_of_all_allocations():
    rng = np.random.default_rng(8)
    for _ in range(20):  # equal prices: greedy is exact, so trying everything cannot do better
        costs = Costs(tuple(Slot(str(i), "text", 50, high=3) for i in range(4)))
        gains = [np.sort(rng.random(3))[::-1] for _ in range(4)]
        totals = [np.concatenate([[0], np.cumsum(gain)]) for gain in gains]
        ranks = fill(costs, 300, by_gain(gains, costs))
        every = np.stack(np.meshgrid(*[range(4)] * 4), -1).reshape(-1, 4)
        best = max(sum(t[r] for t, r in zip(totals, row, strict=True)) for row in every if row.sum() <= 6)
        assert sum(t[r] for t, r in zip(totals, ranks, strict=True)) == pytest.approx(best)


def test_a_shared_trunk_is_paid_once():
    slots = (Slot("a", "vision", 10, high=8), Slot("b", "vision", 10, high=8), Slot("c", "text", 10, high=8))
    ranks = fill(Costs(slots, trunk=15), 55, proportional([2, 1, 0.9]))
    assert ranks.tolist() == [3, 1, 0]  # text would cost a second trunk
