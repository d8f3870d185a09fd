"""Scaling curves: power laws with intervals, how far they can be trusted beyond the data, Pareto fronts.

    fit_power([1, 4, 16, 64], losses)                # a, b, c of  y = a + b x^-c
    judge_curve(x, values, rng)                      # values [X, S, C]: S seeds and C clips at each x
    front(costs, losses)                             # which points no other one beats on both

Pure functions on arrays. Glossary: X sizes, S seeds, C clips (or other units that all sizes share), N draws.
A power law with an offset is the usual form of a loss that falls towards a floor (Hoffmann et al. 2022,
arXiv:2203.15556); three numbers from a handful of sizes are often not determined, which `state` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import stats as distributions
from scipy.optimize import elementwise

from vqlora import stats

C_RANGE = (0.02, 20.0)  # exponents that are looked at; at either end the law is none: a line in log x, a step
POINTS = 4  # sizes without which three numbers are not fitted
WIDE = 4.0  # an interval of the exponent whose ends differ by more says nothing of its size
STATES = ("determined", "wide", "at a bound", "not falling", "no interval")


@dataclass(frozen=True)
class PowerLaw:
    """y = a + b x^-c, each a number or an array of the same shape, one law for each curve."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    def __call__(self, x) -> np.ndarray:
        """Values at sizes that broadcast against a, b and c."""
        return self.a + self.b * np.asarray(x, float) ** -self.c


def fit_power(x, y) -> PowerLaw:
    """Least-squares power laws through `y [..., X]` at sizes `x [X]`, in any order.

    For each exponent a and b solve a linear problem (variable projection, Golub & Pereyra 1973); the exponent
    is the best of a grid, then refined within its neighbours by scipy's bracketing minimiser. Raises
    ValueError for fewer than three sizes, or sizes that are not positive and different.

    >>> law = fit_power([1, 2, 4, 8], [1.5, 1.0, 0.75, 0.625])
    >>> round(float(law.c), 4), round(float(law(16)), 4)
    (1.0, 0.5625)
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or len(x) < 3 or len(set(x)) < len(x) or not (x > 0).all():
        raise ValueError(f"x: {x.tolist()}; allowed: three or more different sizes above 0")
    if y.shape[-1] != len(x) or not np.isfinite(y).all():
        raise ValueError(f"y: shape {list(y.shape)}; allowed: {len(x)} finite values on its last axis")
    middle = np.exp(np.log(x).mean())
    place, curves = np.log(x / middle), y.reshape(-1, len(x))
    which, grid = np.arange(len(curves)), np.linspace(*np.log(C_RANGE), 121)

    def misfit(log_c, index):
        return _project(np.exp(log_c), place, curves[index.astype(int)])[2]

    errors = np.stack([misfit(np.full(len(curves), step), which) for step in grid])
    best = errors.argmin(axis=0)
    inner = np.flatnonzero((best > 0) & (best < len(grid) - 1))
    log_c = grid[best]
    if len(inner):
        around = tuple(grid[best[inner] + shift] for shift in (-1, 0, 1))
        found = elementwise.find_minimum(misfit, around, args=(which[inner],))
        log_c[inner] = np.where(found.success, found.x, log_c[inner])
    c = np.exp(log_c)
    a, b, _ = _project(c, place, curves)
    b = b * middle**c
    return PowerLaw(*(part.reshape(y.shape[:-1]) for part in (a, b, c)))


def _project(c: np.ndarray, place: np.ndarray, curves: np.ndarray) -> tuple[np.ndarray, ...]:
    """Best a and b for exponents `c [N]` of `curves [N, X]`, and the squared error: all [N]."""
    z = np.exp(-c[:, None] * place)
    z_mean, y_mean = z.mean(axis=1), curves.mean(axis=1)
    dz, dy = z - z_mean[:, None], curves - y_mean[:, None]
    b = (dz * dy).sum(axis=1) / (dz**2).sum(axis=1)
    return y_mean - b * z_mean, b, ((dy - b[:, None] * dz) ** 2).sum(axis=1)


def resampled(values: np.ndarray, rng: Generator, resamples: int = 1000) -> np.ndarray:
    """Mean curves [N, X] of `values [X, S, C]`, seeds and clips drawn anew, the same ones for every size.

    As in `stats.interval` each size's draws are stretched about its mean to make up for few seeds. Without a
    second seed or clip there is nothing to draw: no rows.
    """
    values = np.asarray(values, float)
    _, seeds, clips = values.shape
    if seeds * clips == 1:
        return np.empty((0, len(values)))
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_clip = rng.multinomial(clips, np.full(clips, 1 / clips), size=resamples) / clips
    draws, mean = np.einsum("ns,xsc,nc->nx", by_seed, values, by_clip), values.mean(axis=(1, 2))
    tail = 0.025
    for size, matrix in enumerate(values):
        what, spread = stats.spread(matrix), draws[:, size].std()
        if what.se > 0 and spread > 0:
            wider = distributions.t.isf(tail, what.df) * what.se / (distributions.norm.isf(tail) * spread)
            draws[:, size] = mean[size] + wider * (draws[:, size] - mean[size])
    return draws


@dataclass(frozen=True)
class Curve:
    """A fitted curve. Ends are of 95% intervals, NaN where nothing can be drawn.

    foretold: the value at the largest size by a law fitted to the others; held: its error. naive: the error
    of saying what the size before had. gain: naive - held, positive where the law is nearer. state: one of
    STATES.
    """

    law: PowerLaw
    c_low: float
    c_high: float
    foretold: float
    held: float
    naive: float
    gain_low: float
    gain_high: float
    state: str
    verdict: str


def judge_curve(x, values: np.ndarray, rng: Generator, resamples: int = 1000) -> Curve:
    """Fit `values [X, S, C]` at sizes `x [X]`; intervals by a crossed bootstrap; foretell the largest size.

    verdict: "supported" where the gain over the naive rule lies above 0 with its interval, "denied" where it
    lies below, else "undecided". Raises ValueError for fewer than `POINTS` sizes.
    """
    order = np.argsort(x)
    x, values = np.asarray(x, float)[order], np.asarray(values, float)[order]
    if len(x) < POINTS:
        raise ValueError(f"x: {len(x)} sizes; allowed: {POINTS} or more")
    mean, draws = values.mean(axis=(1, 2)), resampled(values, rng, resamples)
    law, (foretold, held, naive) = fit_power(x, mean), map(float, _foretold(x, mean))
    if not len(draws):
        nothing = (float("nan"),) * 2
        return Curve(law, *nothing, foretold, held, naive, *nothing, "no interval", "undecided")
    drawn, ends = fit_power(x, draws), [0.025, 0.975]
    c_low, c_high = np.quantile(drawn.c, ends)
    _, drawn_held, drawn_naive = _foretold(x, draws)
    gain_low, gain_high = np.quantile(drawn_naive - drawn_held, ends)
    verdict = "supported" if gain_low > 0 else "denied" if gain_high < 0 else "undecided"
    found = (c_low, c_high, foretold, held, naive, gain_low, gain_high)
    return Curve(law, *map(float, found), _state(c_low, c_high, np.quantile(drawn.b, ends)), verdict)


def _foretold(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At the largest size: what a law fitted to the others says, its error, that of the value before it."""
    foretold = fit_power(x[:-1], y[..., :-1])(x[-1])
    return foretold, np.abs(foretold - y[..., -1]), np.abs(y[..., -2] - y[..., -1])


def _state(c_low: float, c_high: float, b_ends: np.ndarray) -> str:
    near = 1.01
    if b_ends[0] <= 0:
        return "not falling"
    if c_low <= C_RANGE[0] * near or c_high >= C_RANGE[1] / near:
        return "at a bound"
    return "wide" if c_high > WIDE * c_low else "determined"


def front(costs, losses) -> np.ndarray:
    """Which points [N] no other one dominates: none is at most as dear and as bad, and better in one.

    >>> front([1, 2, 3, 3], [5, 4, 4, 2]).tolist()
    [True, True, False, True]
    """
    costs, losses = np.asarray(costs, float), np.asarray(losses, float)
    if costs.shape != losses.shape or costs.ndim != 1:
        raise ValueError(f"costs {list(costs.shape)}, losses {list(losses.shape)}; allowed: two lists alike")
    no_worse = (costs[:, None] <= costs) & (losses[:, None] <= losses)
    better = (costs[:, None] < costs) | (losses[:, None] < losses)
    return ~(no_worse & better).any(axis=0)
