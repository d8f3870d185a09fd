"""Power laws are recovered with honest intervals; fronts hold no dominated point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqlora.scaling import C_RANGE, POINTS, fit_power, front, judge_curve, resampled

X = np.array([1.0, 2, 4, 8, 16])
numbers = st.floats(0.1, 10)


@settings(max_examples=40, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(0.05, 5), c=st.floats(0.1, 6), scale=st.floats(0.01, 1e4))
def test_known_laws_are_recovered_whatever_the_unit_of_x(a, b, c, scale):
    law = fit_power(X * scale, a + b * X**-c)
    assert float(law.c) == pytest.approx(c, rel=1e-2)
    assert float(law(X[2] * scale)) == pytest.approx(a + b * X[2] ** -c, abs=1e-4 * (abs(a) + b))
    assert float(law.b) * scale**-c == pytest.approx(b, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=5, max_size=5), st.permutations(range(5)))
def test_a_fit_is_a_least_squares_one_and_does_not_mind_the_order(noise, order):
    y = 0.5 + X**-0.7 + 0.05 * np.array(noise)
    law, order = fit_power(X, y), list(order)
    assert float(fit_power(X[order], y[order]).c) == pytest.approx(float(law.c), rel=1e-3)

    def misfit(a, b, c):
        return float(((a + b * X**-c - y) ** 2).sum())

    best = misfit(law.a, law.b, law.c)
    for c in np.geomspace(*C_RANGE, 50):
        z = np.stack([np.ones(5), X**-c], axis=1)
        assert best <= misfit(*np.linalg.lstsq(z, y, rcond=None)[0], c) + 1e-9


def test_many_curves_are_fitted_at_once():
    c = np.array([[0.3, 0.6, 1.2], [0.5, 2.0, 4.0]])
    law = fit_power(X, 1 + 2 * X ** -c[..., None])
    assert law.c.shape == (2, 3) and np.allclose(law.c, c, rtol=1e-3)


def test_sizes_that_cannot_be_fitted_are_named():
    for x in ([1, 2], [1, 1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="three or more different sizes"):
            fit_power(x, np.ones(len(x)))
    with pytest.raises(ValueError, match="3 sizes; allowed: 4 or more"):
        judge_curve([1, 2, 3], np.ones((3, 1, 2)), np.random.default_rng(0))
    assert POINTS == 4


def noisy(curve, sd, rng, seeds=3, clips=40):
    """values [X, S, C]: the curve, with noise of seeds and clips that all sizes share, and a rest."""
    shared = rng.normal(0, sd, (1, seeds, 1)) + rng.normal(0, 5 * sd, (1, 1, clips))
    return np.asarray(curve)[:, None, None] + shared + rng.normal(0, sd, (len(curve), seeds, clips))


def test_a_clear_law_is_determined_and_foretells_the_largest_size():
    rng = np.random.default_rng(0)
    found = judge_curve(X, noisy(0.5 + X**-0.8, 0.002, rng), rng, 300)
    assert found.state == "determined" and found.c_low < 0.8 < found.c_high
    assert found.held < found.naive and found.verdict == "supported" and found.gain_low > 0


def test_no_exponent_is_read_off_a_flat_curve_or_off_noise():
    rng = np.random.default_rng(1)
    flat = judge_curve(X, noisy(np.ones(5), 0.05, rng), rng, 300)
    assert flat.state in ("not falling", "at a bound") and flat.verdict != "supported"
    rising = judge_curve(X, noisy(1 + 0.1 * np.log(X), 0.001, rng), rng, 300)
    assert rising.state == "not falling"
    alone = judge_curve(X, (0.5 + X**-0.8)[:, None, None], rng)
    assert alone.state == "no interval" and np.isnan([alone.c_low, alone.gain_high]).all()
    assert float(alone.law.c) == pytest.approx(0.8, rel=1e-3)


def test_intervals_cover_the_exponent_as_often_as_they_say():
    rng, inside = np.random.default_rng(2), 0
    for _ in range(20):
        found = judge_curve(X, noisy(0.5 + X**-0.8, 0.03, rng, seeds=4), rng, 100)
        inside += found.c_low <= 0.8 <= found.c_high
    assert inside >= 16, "95% of 20, less what four seeds and chance may take"


def test_sizes_are_drawn_together_and_widened_for_few_seeds():
    rng = np.random.default_rng(3)
    values = noisy(np.ones(3), 0.1, rng, seeds=3, clips=500)
    same = np.stack([values[0]] * 3)
    draws = resampled(same, rng, 400)
    assert np.allclose(draws[:, 0], draws[:, 1]), "the same seeds and clips at every size"
    plain = values.mean(axis=2).std(ddof=1) / np.sqrt(3)
    assert resampled(values, rng, 2000).std(axis=0).mean() > 1.3 * plain
    assert len(resampled(np.ones((3, 1, 1)), rng)) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.randoms())
def test_a_front_holds_no_dominated_point_and_all_others(points, shuffler):
    kept = front(*zip(*points, strict=True))
    on = [point for point, keep in zip(points, kept, strict=True) if keep]

    def dominated(point):
        return any(q[0] <= point[0] and q[1] <= point[1] and q != point for q in points)

    assert on and not any(map(dominated, on))
    assert all(dominated(point) for point, keep in zip(points, kept, strict=True) if not keep)
    order = list(range(len(points)))
    shuffler.shuffle(order)
    moved = front(*zip(*(points[i] for i in order), strict=True))
    assert moved.tolist() == [kept[i] for i in order]


def test_a_front_needs_two_lists_alike():
    with pytest.raises(ValueError, match="two lists alike"):
        front([1, 2], [1])
