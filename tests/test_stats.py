"""Intervals and tests: coverage on simulated designs, invariances, agreement with scipy and statsmodels."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vqlora import stats


def simulated(rng, seeds=3, clips=64, mean=0.0, by_seed=0.05, by_clip=0.4, rest=0.2):
    noise = by_seed * rng.standard_normal((seeds, 1)) + by_clip * rng.standard_normal((1, clips))
    return mean + noise + rest * rng.standard_normal((seeds, clips))


def frame(arms):
    """{arm: matrix} -> rows arm, seed, clip, value."""
    return pd.DataFrame(
        [(arm, s, f"clip-{c}", value) for arm, m in arms.items() for s, row in enumerate(m)
         for c, value in enumerate(row)],
        columns=["arm", "seed", "clip", "value"],
    )


matrices = st.tuples(st.integers(2, 5), st.integers(2, 8), st.integers(0, 2**32 - 1)).map(
    lambda t: simulated(np.random.default_rng(t[2]), t[0], t[1])
)


@pytest.mark.parametrize(
    "design",
    [
        dict(seeds=3, by_seed=0.02), dict(seeds=3, by_seed=0.0), dict(seeds=3, by_seed=0.15),
        dict(seeds=10, by_seed=0.1, by_clip=0.1), dict(seeds=10, by_seed=0.0, by_clip=0.0, rest=0.5),
    ],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(design):
    rng = np.random.default_rng(7)
    matrices = [simulated(rng, mean=1.0, **design) for _ in range(150)]
    found = [stats.interval(m, rng, resamples=200) for m in matrices]
    covered = np.mean([i.low <= 1.0 <= i.high for i in found])
    assert 0.88 <= covered <= 0.995
    tested = np.mean([stats.crossed_test(m, null=1.0) > 0.05 for m in matrices])
    assert abs(tested - covered) < 0.04


def test_plain_percentiles_of_three_seeds_are_too_short_and_ours_are_not():
    rng = np.random.default_rng(3)
    plain, ours = [], []
    for _ in range(120):
        values = simulated(rng, seeds=3, by_seed=0.2, by_clip=0.2)
        low, high = np.quantile(stats.crossed_bootstrap(values, rng, 300), [0.025, 0.975])
        plain.append(low <= 0 <= high)
        found = stats.interval(values, rng, resamples=300)
        ours.append(found.low <= 0 <= found.high)
    assert np.mean(plain) < 0.87 < np.mean(ours)


def test_error_agrees_with_the_textbook_where_only_one_axis_varies():
    values = np.repeat(np.random.default_rng(0).standard_normal((1, 30)), 4, axis=0)
    found = stats.spread(values)
    assert found.se == pytest.approx(scipy_stats.sem(values[0])) and found.df == pytest.approx(29)
    assert stats.crossed_test(values) == pytest.approx(scipy_stats.ttest_1samp(values[0], 0).pvalue)
    assert stats.spread(values[:1]).se == pytest.approx(found.se)
    assert stats.spread(values.T).se == pytest.approx(found.se)


def test_error_agrees_with_the_anova_of_statsmodels():
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    values = simulated(np.random.default_rng(1), seeds=4, clips=12, by_seed=0.5)
    rows = frame({"a": values}).assign(seed=lambda f: f["seed"].astype(str))
    table = anova_lm(ols("value ~ seed + clip", rows).fit())
    square = table["sum_sq"] / table["df"]
    expected = math.sqrt((square["seed"] + square["clip"] - square["Residual"]) / values.size)
    assert stats.spread(values).se == pytest.approx(expected)


@given(matrices, st.floats(-5, 5), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_intervals_move_and_scale_with_the_values(values, shift, scale):
    a = stats.interval(values, np.random.default_rng(0), resamples=200)
    b = stats.interval(values * scale + shift, np.random.default_rng(0), resamples=200)
    expected = [x * scale + shift for x in (a.low, a.mean, a.high)]
    assert (b.low, b.mean, b.high) == pytest.approx(expected, abs=1e-6)
    mirrored = stats.interval(-values, np.random.default_rng(0), resamples=200)
    assert (mirrored.low, mirrored.high) == pytest.approx((-a.high, -a.low), abs=1e-9)
    assert a.low <= a.mean <= a.high


@given(matrices, st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_seeds_and_clips_does_not_matter(values, random):
    rows, columns = list(range(values.shape[0])), list(range(values.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    mixed = values[rows][:, columns]
    assert stats.spread(mixed).se == pytest.approx(stats.spread(values).se)
    assert stats.crossed_test(mixed) == pytest.approx(stats.crossed_test(values))


def test_bootstrap_means_follow_their_generator_and_have_the_spread_of_a_two_way_draw():
    values = simulated(np.random.default_rng(0), seeds=5, clips=40, by_seed=0.3)
    a, b = (stats.crossed_bootstrap(values, np.random.default_rng(9), 4000) for _ in range(2))
    assert (a == b).all()
    rng = np.random.default_rng(2)
    slow = [values[rng.integers(0, 5, 5)][:, rng.integers(0, 40, 40)].mean() for _ in range(4000)]
    assert a.mean() == pytest.approx(np.mean(slow), abs=0.02)
    assert a.std() == pytest.approx(np.std(slow), rel=0.06)


def test_one_value_and_constant_values_give_no_false_certainty():
    single = stats.interval(np.array([[0.5]]), np.random.default_rng(0))
    assert single.mean == 0.5 and math.isnan(single.low) and math.isnan(stats.crossed_test(np.array([[0.5]])))
    constant = stats.interval(np.full((3, 4), 0.25), np.random.default_rng(0))
    assert (constant.low, constant.high) == (0.25, 0.25)
    assert stats.crossed_test(np.full((3, 4), 0.25)) == 0.0 and stats.crossed_test(np.zeros((3, 4))) == 1.0


def test_sign_flips_are_exact_for_few_units_and_agree_with_the_t_test_for_many():
    rng = np.random.default_rng(0)
    assert stats.sign_flip_test(np.ones((3, 5)), rng, "seed") == 2 / 2**3
    assert stats.sign_flip_test(np.ones((10, 5)), rng, "seed") == 2 / 2**10
    values = simulated(rng, seeds=1, clips=80, mean=0.1)
    expected = scipy_stats.ttest_1samp(values[0], 0).pvalue
    assert stats.sign_flip_test(values, rng, "clip") == pytest.approx(expected, abs=0.03)
    assert math.isnan(stats.sign_flip_test(values, rng, "seed"))
    with pytest.raises(ValueError, match="unit"):
        stats.sign_flip_test(values, rng, "frame")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_holm_is_monotone_and_between_p_and_bonferroni(p):
    adjusted = stats.holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all()


def test_holm_agrees_with_statsmodels():
    from statsmodels.stats.multitest import multipletests

    p = [0.04, 0.001, 0.3, 0.04, 0.011, 0.9]
    assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert stats.holm([]).shape == (0,)


def test_holm_leaves_unknown_p_values_out_of_the_family():
    adjusted = stats.holm([0.01, math.nan, 0.04])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.04]) and math.isnan(adjusted[1])


def test_tost_is_two_one_sided_t_tests():
    from statsmodels.stats.weightstats import DescrStatsW

    values = np.random.default_rng(0).normal(0.01, 0.1, (1, 60))
    expected = DescrStatsW(values[0]).ttost_mean(-0.05, 0.05)[0]
    assert stats.claim_p(values, "equivalent", 0.05) == pytest.approx(expected)
    assert stats.claim_p(values, "no_worse", 0.05) <= stats.claim_p(values, "equivalent", 0.05)
    for claim, margin in (("equivalent", 0.0), ("no_worse", -1.0)):
        with pytest.raises(ValueError, match="positive margin"):
            stats.claim_p(values, claim, margin)
    with pytest.raises(ValueError, match="claim must be one of greater, no_worse, equivalent, got 'same'"):
        stats.claim_p(values, "same", 0.1)


def test_false_equivalence_is_as_rare_as_promised():
    rng = np.random.default_rng(5)
    wrong = [stats.claim_p(simulated(rng, mean=0.1), "equivalent", 0.1) < 0.05 for _ in range(300)]
    assert np.mean(wrong) < 0.09


@pytest.mark.parametrize(
    ("p", "low", "high", "claim", "margin", "expected"),
    [
        (0.01, 0.1, 0.3, "greater", 0, "supported"),
        (0.2, -0.1, 0.3, "greater", 0, "undecided"),
        (0.9, -0.3, -0.1, "greater", 0, "denied"),
        (0.2, -0.1, 0.02, "greater", 0.05, "denied"),  # whatever gain there is is too small to matter
        (0.01, -0.02, 0.01, "equivalent", 0.05, "supported"),
        (0.4, -0.2, 0.2, "equivalent", 0.05, "undecided"),
        (0.9, 0.06, 0.2, "equivalent", 0.05, "denied"),
        (0.9, -0.2, -0.06, "no_worse", 0.05, "denied"),
        (0.01, 0.06, 0.2, "no_worse", 0.05, "supported"),
        (math.nan, math.nan, math.nan, "greater", 0, "undecided"),
    ],
)
def test_verdicts(p, low, high, claim, margin, expected):
    assert stats.verdict(p, low, high, claim, margin) == expected


def test_an_effect_of_the_stated_size_is_found_with_the_stated_power():
    rng = np.random.default_rng(11)
    size = np.mean([stats.smallest_effect(simulated(rng)) for _ in range(50)])
    found = np.mean([stats.crossed_test(simulated(rng, mean=size)) < 0.05 for _ in range(300)])
    assert 0.7 < found < 0.93


def test_matrix_counts_rows_as_the_plain_mean_does_and_lets_values_not_apply():
    rows = pd.DataFrame(
        [(0, "a", 1.0), (0, "a", 0.0), (0, "a", 0.0), (0, "b", 1.0), (0, "c", math.nan), (1, "a", 0.0),
         (1, "a", 0.0), (1, "a", 0.0), (1, "b", 1.0), (1, "c", 1.0)],
        columns=["seed", "clip", "value"],
    )
    matrix = stats.crossed(rows)
    assert matrix.shape == (2, 3) and matrix.to_numpy().mean() == pytest.approx(rows["value"].mean())


def test_holes_in_a_design_are_named():
    rows = frame({"lora": np.zeros((2, 3)), "qlora": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="seed 1 of lora has no value for clip 'clip-2'"):
        stats.summarise(rows.drop(index=5), np.random.default_rng(0))
    with pytest.raises(ValueError, match="'lora', 'qlora' are not paired: seed 1"):
        stats.paired(rows[~((rows["arm"] == "qlora") & (rows["seed"] == 1))], "lora", "qlora")
    with pytest.raises(ValueError, match="lack the columns value"):
        stats.crossed(rows.drop(columns="value"))
    with pytest.raises(ValueError, match="of full hold no value"):
        stats.paired(rows, "full", "lora")
    with pytest.raises(ValueError, match="not finite"):
        stats.spread(np.array([[1.0, math.inf]]))


def test_tables_of_several_runs():
    rng = np.random.default_rng(0)
    base = simulated(rng, by_seed=0.0, rest=0.0, clips=100)
    near, far = (base + rng.normal(gain, 0.02, base.shape) for gain in (0.001, -0.3))
    rows = frame({"lora": base, "qlora": near, "frozen": far})
    table = stats.summarise(rows, rng)
    assert list(table.columns) == ["arm", "mean", "low", "high", "n_seeds", "n_clips"]
    assert list(table["arm"]) == ["lora", "qlora", "frozen"] and (table["n_clips"] == 100).all()
    assert table["mean"][0] == pytest.approx(base.mean())

    claims = [
        {"a": "qlora", "b": "lora", "claim": "equivalent", "margin": 0.02},
        {"a": "qlora", "b": "frozen", "claim": "greater"},
        {"a": "frozen", "b": "lora", "claim": "no_worse", "margin": 0.02},
    ]
    found = stats.compare(rows, claims, rng)
    assert list(found["verdict"]) == ["supported", "supported", "denied"]
    assert (found["p_holm"] >= found["p"]).all()
    assert found["low"][1] < found["difference"][1] < found["high"][1]
    assert found["tost_low"][0] > found["low"][0]
    worse = stats.compare(rows, claims[1:2], rng, better="lower")
    assert worse["difference"][0] == pytest.approx(-found["difference"][1])
    assert worse["verdict"][0] == "denied"


def test_holm_counts_within_families_and_an_absent_margin_is_none():
    tests = pd.DataFrame({"p": [0.01, 0.9, 0.03], "low": [0.1, -0.3, -0.1], "high": [0.3, -0.1, 0.2],
                          "claim": "greater", "margin": [math.nan, math.nan, 0.05],
                          "family": ["a", "b", "a"]})  # fmt: skip
    whole, parts = stats.corrected(tests), stats.corrected(tests, "family")
    assert list(whole["p_holm"]) == pytest.approx([0.03, 0.9, 0.06])
    assert list(whole["verdict"]) == ["supported", "denied", "undecided"]
    assert list(parts["p_holm"]) == pytest.approx([0.02, 0.9, 0.03])
    assert list(parts["verdict"]) == ["supported", "denied", "supported"]
    assert math.isnan(whole["margin"][0])
