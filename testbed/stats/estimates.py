"""One sample's mean, median, quantiles and shares with intervals, over examples; and which points none other beats.

The unit is the example (the *cluster*): an example's rows (repeats, links) are not independent. The mean of what has
bounds, such as a score, has Gaffke's interval (`bounded`). That of an unbounded mean is the wider, end by end, of two
bootstrap intervals:

* the studentized one (bootstrap-t; B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993,
  section 12.5), which follows skewness: losses are mostly near 0 and now and then large, and an interval that
  is as long on either side of such a mean ends too low on the side that says "nothing is lost";
* the percentile one with its quantiles expanded for small samples (T. Hesterberg, "What Teachers Should Know
  About the Bootstrap", The American Statistician 69(4), 2015, section 3.2), which is better where values are
  symmetric with heavy tails.

Of samples of 6, 20 and 50 lognormal values the pair holds the mean in 90, 92 and 95 %, scipy's BCa in 78, 88
and 91 %, the percentile interval alone in 85, 88 and 91 %. No interval knows of what a sample does not hold:
`share_above` bounds how many such examples there may be. Everything is seeded: the same rows give the same
interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy import stats as scipy_stats

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Estimate:
    """A statistic and its interval; `n` is the number of examples. NaN where the data does not allow one."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 2, sign: str = "") -> str:
        """For people: ``1.25 [1.10, 1.42]``, without the interval where there is none; a dash where there is no value."""
        if math.isnan(self.value):
            return "-"
        form = f"{sign}.{digits}f"
        interval = f" [{self.low:{form}}, {self.high:{form}}]" if math.isfinite(self.low) else ""
        return f"{self.value:{form}}{interval}"


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)


def _tails(n: int) -> tuple[float, float]:
    """The two quantiles of the bootstrap distribution that bound the interval of a statistic of `n`
    examples.
    """
    t = special.stdtrit(n - 1, TAIL)
    tail = float(special.ndtr(np.sqrt(n / (n - 1)) * t))
    return tail, 1 - tail


def _codes(labels: npt.ArrayLike | None, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """A number for each label of what is known; without labels each value has its own."""
    keys = np.arange(len(known)) if labels is None else np.asarray(labels)
    return np.unique(keys[known].astype(str), return_inverse=True)[1].reshape(-1)


def by_example(
    sides: Sequence[npt.ArrayLike], clusters: npt.ArrayLike | None, strata: npt.ArrayLike | None = None
) -> list[Floats]:
    """For each stratum its examples' means of each side: [sides, examples]. Where a side is not finite, no side counts;
    empty where nothing is left.
    """
    data = np.stack([np.asarray(side, dtype=np.float64).ravel() for side in sides])
    known = np.logical_and.reduce(np.isfinite(data))
    if not known.any():
        return []
    tasks = _codes(np.zeros(len(known)) if strata is None else strata, known)
    data, examples = data[:, known], _codes(clusters, known)
    groups = []
    for task in range(int(tasks.max()) + 1):
        own = tasks == task
        _, codes, weights = np.unique(examples[own], return_inverse=True, return_counts=True)
        groups.append(np.stack([np.bincount(codes.reshape(-1), side[own]) / weights for side in data]))
    return groups


def bounded(
    groups: Sequence[Floats], bounds: tuple[float, float], resamples: int, seed: int
) -> tuple[float, float]:
    """The ends of the interval of a mean over strata (`groups`) of values within `bounds`, as N. Gaffke has it ("Three Test
    Statistics for a Nonparametric One-Sided Hypothesis on the Mean of a Nonnegative Variable", Mathematical Methods of
    Statistics 14(4), 2005): the ordered values, and one unseen example at the bound, are weighed with the n + 1 gaps between n
    uniform values. Where every value lies on a bound, this is Clopper and Pearson's. Either end rises with every value,
    whatever the draws: of two samples of one size the one that is nowhere lower never has the lower end.
    """
    generator = np.random.default_rng(seed)
    least, most = np.zeros(resamples), np.zeros(resamples)
    for own in groups:
        ordered = np.sort(own)
        gaps = generator.dirichlet(np.ones(len(ordered) + 1), resamples)
        least += (gaps @ np.r_[bounds[0], ordered]) / len(groups)
        most += (gaps @ np.r_[ordered, bounds[1]]) / len(groups)
    return float(np.quantile(least, TAIL)), float(np.quantile(most, 1 - TAIL))


def _resampled_means(values: Floats, resamples: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Bootstrap distribution of the mean of independent `values`, and of its squared standard error: each
    [resamples].
    """
    n = len(values)
    drawn = values[generator.integers(0, n, (resamples, n))]
    return drawn.mean(axis=1), drawn.var(axis=1, ddof=1) / n


def _studentized(point: float, draws: Floats, squared: Floats, error: float) -> tuple[float, float]:
    """The ends of the bootstrap-t interval: resampled means and their squared standard errors against the
    sample's own `error`.

    A resample of equal values has no error of its own: it is taken to be at least a tenth of the sample's.
    """
    if not error > 0:
        return point, point
    t = (draws - point) / np.maximum(np.sqrt(squared), 0.1 * error)
    low, high = np.quantile(t, (TAIL, 1 - TAIL))
    return point - float(high) * error, point - float(low) * error


def mean(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean over examples with its interval (see above).

    `clusters` names each value's example (None: each value its own): an example's values are averaged
    first, so that each example counts once. `strata` names each value's task: the result is then the mean
    over the tasks' means, with examples resampled within their task. `bounds`: the least and largest
    possible value. Values that are not finite are left out. With one example per stratum there is no interval (NaN).
    """
    groups = [averaged for (averaged,) in by_example([values], clusters, strata)]
    if not groups:
        return NOTHING
    sizes, point = [len(own) for own in groups], float(np.mean([own.mean() for own in groups]))
    if min(sizes) < 2:
        return Estimate(point, float("nan"), float("nan"), sum(sizes))
    if bounds is not None:
        low, high = bounded(groups, bounds, resamples, seed)
        return Estimate(point, min(low, point), max(high, point), sum(sizes))
    generator = np.random.default_rng(seed)
    draws, squared, error = np.zeros(resamples), np.zeros(resamples), 0.0
    for own in groups:
        means, errors = _resampled_means(own, resamples, generator)
        draws += means / len(groups)
        squared += errors / len(groups) ** 2
        error += float(own.var(ddof=1)) / len(own) / len(groups) ** 2
    low, high = (float(end) for end in np.quantile(draws, _tails(min(sizes))))
    ends = _studentized(point, draws, squared, math.sqrt(error))
    return Estimate(point, min(low, point, ends[0]), max(high, point, ends[1]), sum(sizes))


def median(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Median of all values with its bootstrap percentile interval; whole examples (`clusters`) are
    resampled. NaN is left out, and infinity (a request that failed) takes part; with one example there is no
    interval (NaN).
    """
    data, codes, n = _ordered(values, clusters)
    if not n:
        return NOTHING
    point = float(np.median(data))
    if n < 2:
        return Estimate(point, float("nan"), float("nan"), n)
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    step = max(1, 4_000_000 // len(data))  # bounds the memory, whatever the number of rows
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picks = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
        draws[start : start + size] = _weighted_medians(data, weights[:, codes])
    low, high = (_quantile(draws, tail) for tail in (TAIL, 1 - TAIL))
    return Estimate(point, min(low, point), max(high, point), n)


def _ordered(
    values: npt.ArrayLike, clusters: npt.ArrayLike | None
) -> tuple[Floats, npt.NDArray[np.intp], int]:
    """The values but NaN in ascending order, a number for each one's example, and how many examples there are."""
    data = np.asarray(values, dtype=np.float64).ravel()
    known = ~np.isnan(data)
    codes, order = _codes(clusters, known), np.argsort(data[known], kind="stable")
    return data[known][order], codes[order], int(codes.max()) + 1 if len(codes) else 0


def _quantile(values: Floats, q: float) -> float:
    """The quantile by linear interpolation; of infinite values, without it."""
    method: Any = "linear" if np.isfinite(values).all() else "higher"
    return float(np.quantile(values, q, method=method))


def _weighted_medians(ordered: Floats, weights: npt.NDArray[np.intp]) -> Floats:
    """Median of `ordered` [n] with each value repeated `weights` [resamples, n] times: [resamples]."""
    reached = weights.cumsum(axis=1)
    total = reached[:, -1:]
    lower = (2 * reached >= total).argmax(axis=1)
    upper = (2 * reached > total).argmax(axis=1)
    return np.asarray((ordered[lower] + ordered[upper]) / 2)


def quantile(
    values: npt.ArrayLike,
    q: float,
    clusters: npt.ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The `q`-quantile of all values (0 < q < 1; 0.95 for the latency that 19 of 20 requests stay below).

    Where each example has one value, the interval lies between two order statistics and holds whatever the
    distribution is (W. J. Conover, "Practical Nonparametric Statistics", 3rd edition, 1999, section 3.2);
    where examples have several, whole examples are resampled. An end that the sample cannot bound is
    infinite: the greatest of n values bounds the q-quantile from above with confidence 1 - q^n only. NaN is left
    out, and infinity (a request that failed) takes part.
    """
    data, codes, n = _ordered(values, clusters)
    if not n:
        return NOTHING
    point = _quantile(data, q)
    if n < 2:
        return Estimate(point, float("nan"), float("nan"), n)
    if n == len(data):
        low, high = _between_order_statistics(data, q, TAIL)
    else:
        generator = np.random.default_rng(seed)
        groups = [data[codes == code] for code in range(n)]
        draws = [
            _quantile(np.concatenate([groups[i] for i in generator.integers(0, n, n)]), q)
            for _ in range(min(resamples, 500))
        ]
        low, high = (_quantile(np.array(draws), end) for end in (TAIL, 1 - TAIL))
        low = low if (1 - q) ** n <= TAIL else -math.inf
        high = high if q**n <= TAIL else math.inf
    return Estimate(point, min(low, point), max(high, point), n)


def _between_order_statistics(ordered: Floats, q: float, tail: float) -> tuple[float, float]:
    """The narrowest pair of order statistics that miss the q-quantile on either side with probability at
    most `tail`.
    """
    n = len(ordered)
    at_most = special.bdtr(np.arange(n), n, q)  # P(at most k of n values lie below the quantile)
    below = np.flatnonzero(at_most <= tail)  # ordered[k] exceeds the quantile with that probability
    above = np.flatnonzero(at_most >= 1 - tail)
    low = float(ordered[below[-1]]) if len(below) else -math.inf
    high = float(ordered[above[0]]) if len(above) else math.inf
    return low, high


def pareto_front(cost: npt.ArrayLike, gain: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Indices of the points that no other point beats (lower or equal cost and higher or equal gain, one of
    them strictly), by cost.

    Points that are equal in both are all kept. Points with a value that is not finite are never on the front.
    """
    x, y = np.asarray(cost, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    order = usable[np.lexsort((-y[usable], x[usable]))]
    front: list[int] = []
    for index in order:
        if not front or y[index] > y[front[-1]] or (y[index] == y[front[-1]] and x[index] == x[front[-1]]):
            front.append(int(index))
    return np.array(front, dtype=np.intp)


def share_above(values: npt.ArrayLike, limit: float, clusters: npt.ArrayLike | None = None) -> Estimate:
    """The share of examples whose value (mean over an example's values) is above `limit`, with the exact
    binomial interval (C. Clopper and E. Pearson, "The Use of Confidence or Fiducial Limits Illustrated in
    the Case of the Binomial", Biometrika 26(4), 1934).

    It says what a mean cannot: of 50 examples that lose nothing, up to 7 in 100 like them may lose any
    amount. Values that are not finite are left out.
    """
    groups = by_example([values], clusters)
    if not groups:
        return NOTHING
    ((averaged,),) = groups
    above, n = int((averaged > limit).sum()), len(averaged)
    interval = scipy_stats.binomtest(above, n).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(above / n, float(interval.low), float(interval.high), n)
