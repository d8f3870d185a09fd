"""Intervals, tests and verdicts for results crossed over seeds and clips.

Every arm is trained with S seeds and scored on the same C clips, so a result is a matrix `values [S, C]` and
both its axes are samples: of trainings and of clips. All functions take such a matrix (a paired difference is
one too) and generalise to new seeds *and* new clips, as far as S and C allow.

    m_sc = mean + seed_s + clip_c + rest_sc                                    (two-way layout)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy import stats

CLAIMS = ("greater", "no_worse", "equivalent")


@dataclass(frozen=True)
class Spread:
    """`mean` of a matrix, its standard error over new seeds and clips, that error's degrees of freedom."""

    mean: float
    se: float
    df: float


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def spread(values: np.ndarray) -> Spread:
    """Mean and standard error of `values [S, C]` by the two-way random-effects layout (no replicates).

    With mean squares MS of seeds, clips and rest, var(mean) = (MS_s + MS_c - MS_r) / SC; a component that
    comes out negative is taken as zero. Degrees of freedom by Satterthwaite (1946). One seed (or one clip)
    alone says nothing of its own spread: the error is then that over the other axis. Raises ValueError for
    anything but a finite, non-empty matrix.
    """
    values = _matrix(values)
    seeds, clips = values.shape
    mean = values.mean()
    by_seed, by_clip = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    if min(seeds, clips) == 1:
        line = by_clip if seeds == 1 else by_seed
        if len(line) == 1:
            return Spread(float(mean), math.nan, math.nan)
        return Spread(float(mean), float(line.std(ddof=1) / math.sqrt(len(line))), len(line) - 1.0)
    rest = values - mean - by_seed[:, None] - by_clip
    squares = {
        "seed": (clips * (by_seed**2).sum() / (seeds - 1), seeds - 1),
        "clip": (seeds * (by_clip**2).sum() / (clips - 1), clips - 1),
    }
    ms_rest, df_rest = (rest**2).sum() / ((seeds - 1) * (clips - 1)), (seeds - 1) * (clips - 1)
    terms = [(ms, df) for ms, df in squares.values() if ms > ms_rest]
    terms = [*terms, (-ms_rest, df_rest)] if len(terms) == 2 else terms or [(ms_rest, df_rest)]
    total = sum(ms for ms, _ in terms)
    below = sum(ms**2 / df for ms, df in terms)
    df = total**2 / below if below > 0 else float(df_rest)
    return Spread(float(mean), math.sqrt(total / values.size), df)


def crossed_bootstrap(values: np.ndarray, rng: Generator, resamples: int = 4000) -> np.ndarray:
    """Means [resamples] of `values [S, C]` with seeds and clips drawn anew, both with replacement (Owen
    2007).
    """
    values = _matrix(values)
    seeds, clips = values.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_clip = rng.multinomial(clips, np.full(clips, 1 / clips), size=resamples) / clips
    return np.einsum("nc,nc->n", by_seed @ values, by_clip)


def interval(values: np.ndarray, rng: Generator, level: float = 0.95, resamples: int = 4000) -> Interval:
    """Interval of the mean of `values [S, C]` by the crossed bootstrap, widened for few seeds.

    Percentile intervals of few seeds are too short: they miss a factor sqrt(S / (S - 1)) and the tails of t.
    As in Hesterberg's (2015) expanded percentiles, the distances of the percentiles from the mean are
    stretched so that a normal bootstrap distribution would give the t interval of `spread`; the shape stays
    the bootstrap's. NaN limits for a single value. With one seed the interval is for that seed.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    what = spread(values)
    if not what.se > 0:
        return Interval(what.mean, what.mean + what.se * 0, what.mean + what.se * 0)
    means = crossed_bootstrap(values, rng, resamples)
    tail = (1 - level) / 2
    stretch = stats.t.isf(tail, what.df) * what.se / (stats.norm.isf(tail) * means.std())
    low, high = what.mean + stretch * (np.quantile(means, [tail, 1 - tail]) - what.mean)
    return Interval(what.mean, float(low), float(high))


def crossed_test(values: np.ndarray, null: float = 0.0, side: str = "two-sided") -> float:
    """p-value of 'the mean of `values [S, C]` over new seeds and clips is `null`', by t with the error of
    `spread`.

    side: "two-sided", "greater" or "less" (what the alternative says of the mean).
    """
    what = spread(values)
    if not what.se > 0:
        beyond = {"two-sided": what.mean != null, "greater": what.mean > null, "less": what.mean < null}[side]
        return math.nan if math.isnan(what.se) else float(not beyond)
    t = (what.mean - null) / what.se
    two_sided = 2 * stats.t.sf(abs(t), what.df)
    p = {"two-sided": two_sided, "greater": stats.t.sf(t, what.df), "less": stats.t.cdf(t, what.df)}
    return float(p[side])


def sign_flip_test(values: np.ndarray, rng: Generator, unit: str = "clip", resamples: int = 9999) -> float:
    """Two-sided p of the paired sign-flip (permutation) test on differences `values [S, C]`, exact where that
    is cheap.

    unit "clip": clips are flipped, the seeds are taken as they are (these trainings, new clips). unit "seed":
    seeds are flipped, the clips are taken as they are; S seeds cannot give a p below 2 / 2**S. Neither alone
    generalises to both: that is `crossed_test`.
    """
    if unit not in ("clip", "seed"):
        raise ValueError(f"unit must be 'clip' or 'seed', got {unit!r}")
    line = _matrix(values).mean(axis=0 if unit == "clip" else 1)
    if len(line) < 2:
        return math.nan
    result = stats.permutation_test(
        (line,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=resamples, rng=rng
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm-adjusted p-values, float64 [N]; NaN stays NaN and does not count as a comparison.

    Three lines of our own: statsmodels' `multipletests` collects garbage on each call, seconds beside torch.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(p.shape, math.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def claim_p(values: np.ndarray, claim: str, margin: float = 0.0) -> float:
    """One p-value for a claim on differences `values [S, C]`, positive meaning better; small p speaks for the
    claim.

    "greater": the mean is above 0 (one-sided). "no_worse": it is above -margin. "equivalent": it is within
    ±margin (TOST: the larger of two one-sided p-values). Raises ValueError for another claim, or a margin
    that is not positive where needed.
    """
    if claim not in CLAIMS:
        raise ValueError(f"claim must be one of {', '.join(CLAIMS)}, got {claim!r}")
    if claim != "greater" and not margin > 0:
        raise ValueError(f"claim {claim!r} needs a positive margin, got {margin}")
    if claim == "greater":
        return crossed_test(values, 0.0, "greater")
    worse = crossed_test(values, -margin, "greater")
    return worse if claim == "no_worse" else max(worse, crossed_test(values, margin, "less"))


def verdict(p: float, low: float, high: float, claim: str, margin: float = 0.0, alpha: float = 0.05) -> str:
    """"supported", "denied" or "undecided", from a claim's (Holm-adjusted) p and the interval of the
    difference.

    Denied needs evidence too. "greater": the interval lies below 0, or below `margin` if one is stated
    (whatever gain there is is smaller than what matters). "no_worse": it lies below -margin. "equivalent": it
    lies outside ±margin.
    """
    if claim not in CLAIMS:
        raise ValueError(f"claim must be one of {', '.join(CLAIMS)}, got {claim!r}")
    if p < alpha:
        return "supported"
    against = {
        "greater": high < max(margin, 0.0),
        "no_worse": high < -margin,
        "equivalent": low > margin or high < -margin,
    }
    return "denied" if against[claim] else "undecided"


def corrected(tests: pd.DataFrame, within: str | None = None) -> pd.DataFrame:
    """Tests with `p_holm` and `verdict` anew from p, low, high, claim and margin (absent: none).

    Holm's method over all of them, or within each value of a column, whose tests are families of their own.
    """
    if within is None:
        p = holm(tests["p"])
    else:
        p = tests.groupby(within, sort=False)["p"].transform(lambda own: holm(own))
    table = tests.assign(p_holm=p)
    fields = table[["p_holm", "low", "high", "claim", "margin"]].fillna({"margin": 0.0})
    return table.assign(verdict=[verdict(*row) for row in fields.itertuples(index=False)])


def smallest_effect(values: np.ndarray, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true mean of `values [S, C]` that a two-sided test at `alpha` would have found with this
    `power`.
    """
    what = spread(values)
    return float((stats.t.isf(alpha / 2, what.df) + stats.t.isf(1 - power, what.df)) * what.se)


def crossed(examples: pd.DataFrame, name: str = "") -> pd.DataFrame:
    """The matrix (index seed, columns clip) of one arm's rows `seed, clip, value`, ready for the functions
    above.

    A clip with several rows (questions) counts by its number of rows: cell = R + (sum - R·n) / mean(n), with
    R the mean of all rows, so that the matrix mean is R. NaN means 'does not apply' and is not counted.
    Raises ValueError, naming the first hole, unless every clip has a row under every seed.
    """
    of = f" of {name}" if name else ""
    if missing := {"seed", "clip", "value"} - set(examples.columns):
        raise ValueError(f"examples{of} lack the columns {', '.join(sorted(missing))}")
    if not examples["value"].notna().any():
        raise ValueError(f"examples{of} hold no value")
    cells = examples.groupby(["seed", "clip"])["value"].agg(["sum", "count"])
    total, count = cells["sum"].unstack(), cells["count"].unstack()
    if total.isna().to_numpy().any():
        seed, clip = next((s, c) for s in total.index for c in total.columns if np.isnan(total.loc[s, c]))
        raise ValueError(f"seed {seed}{of} has no value for clip {clip!r}, which other seeds have")
    mean = total.to_numpy().sum() / count.to_numpy().sum()
    return mean + (total - mean * count) / count.to_numpy().mean()


def summarise(
    examples: pd.DataFrame, rng: Generator, by: Sequence[str] = ("arm",), level: float = 0.95
) -> pd.DataFrame:
    """One row per group of `by` in `examples` (by, seed, clip, value): mean, low, high, n_seeds, n_clips."""
    table = []
    for key, rows in examples.groupby(list(by), sort=False):
        matrix = crossed(rows, "/".join(map(str, key)))
        found = interval(matrix.to_numpy(), rng, level)
        sizes = {"n_seeds": matrix.shape[0], "n_clips": matrix.shape[1]}
        table.append(dict(zip(by, key, strict=True)) | found.__dict__ | sizes)
    return pd.DataFrame(table)


def paired(examples: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """The matrix of paired differences a - b (index seed, columns clip) of two values of the column `arm`.

    Raises ValueError, naming the odd one, unless both arms have the same seeds and the same clips.
    """
    sides = [crossed(examples[examples["arm"] == arm], arm) for arm in (a, b)]
    for axis, what in ((0, "seed"), (1, "clip")):
        if len(odd := sides[0].axes[axis].symmetric_difference(sides[1].axes[axis])):
            raise ValueError(f"{a!r}, {b!r} are not paired: {what} {odd[0]} is in one ({len(odd)} such)")
    return sides[0] - sides[1].loc[sides[0].index, sides[0].columns]


def compare(
    examples: pd.DataFrame,
    claims: Sequence[Mapping],
    rng: Generator,
    alpha: float = 0.05,
    better: str = "higher",
) -> pd.DataFrame:
    """Test a family of claims about pairs of arms; Holm over the family.

    examples: arm, seed, clip, value. claims: mappings with `a`, `b`, `claim` (one of CLAIMS: 'a is greater
    than / no worse than / equivalent to b') and `margin` (in units of the value; optional for "greater").
    better: "higher" or "lower"; with "lower" (a loss) differences are counted as b - a.
    Returns one row per claim: a, b, claim, margin, difference (positive: a is better), low, high (1 - alpha),
    tost_low, tost_high (1 - 2 alpha: within ±margin means equivalent), p, p_holm, smallest_effect, n_seeds,
    n_clips, verdict.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', got {better!r}")
    rows = []
    for claim in claims:
        a, b, kind, margin = claim["a"], claim["b"], claim["claim"], float(claim.get("margin") or 0.0)
        values = paired(examples, a, b).to_numpy() * (1 if better == "higher" else -1)
        wide, narrow = interval(values, rng, 1 - alpha), interval(values, rng, 1 - 2 * alpha)
        rows.append({
            "a": a, "b": b, "claim": kind, "margin": margin,
            "difference": wide.mean, "low": wide.low, "high": wide.high,
            "tost_low": narrow.low, "tost_high": narrow.high, "p": claim_p(values, kind, margin),
            "smallest_effect": smallest_effect(values, alpha=alpha),
            "n_seeds": values.shape[0], "n_clips": values.shape[1],
        })
    table = pd.DataFrame(rows)
    if len(table):
        table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
        fields = table[["p_holm", "low", "high", "claim", "margin"]].itertuples(index=False)
        table["verdict"] = [verdict(*row, alpha=alpha) for row in fields]
    return table


def _matrix(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be a non-empty matrix [seeds, clips], got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"values hold {int((~np.isfinite(values)).sum())} entries that are not finite")
    return values
