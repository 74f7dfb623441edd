"""Two measurements of the same examples: their difference, their ratio and what one keeps of the other, tested and bounded.

What is compared has met the same examples, so that an example's difficulty cancels out. Two tests say
whether the difference is there: Wilcoxon's signed-rank test (F. Wilcoxon, "Individual Comparisons by Ranking
Methods", Biometrics Bulletin 1(6), 1945) over examples, and the bootstrap interval of the mean difference. Right
and wrong answers have McNemar's, and a family of such comparisons is adjusted by Holm's procedure.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special
from scipy import stats as scipy_stats

from testbed.stats.estimates import NOTHING, RESAMPLES, TAIL, Estimate, Floats, by_example, expanded, mean

POWER, LEVEL = 0.8, 0.05  #: of what a number of examples is said to show
NAN = float("nan")


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference with its interval over `n` examples.

    `p`: Wilcoxon's signed-rank test, two-sided, 1 where no example differs, NaN below two examples;
    `detectable`: the smallest mean difference that this many examples, as spread as these, show at 5 % with
    a probability of 80 %; NaN where the data does not say.
    """

    p: float
    detectable: float


def difference(
    values: npt.ArrayLike,
    baseline: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of `values` − `baseline`, whose elements belong together pair by pair.

    `clusters` and `strata` as in `mean`: examples are averaged first and count once, tasks count equally.
    `bounds`: the least and largest possible value of either side; where all examples differ alike (mostly:
    not at all), the interval is that of another outcome so rare that it stayed unseen. Pairs with a value
    that is not finite are left out.
    """
    change = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    estimate = mean(change, clusters, strata, skewed=bounds is None, resamples=resamples, seed=seed)
    groups = [own for (own,) in by_example([change], clusters, strata)]
    n = estimate.n
    if n < 2:
        return Difference(estimate.value, NAN, NAN, n, NAN, NAN)
    averaged = np.concatenate(groups)
    p = signed_rank(averaged)
    if bounds is not None and np.ptp(averaged) == 0:
        unseen, most = _unseen(bounds, n), bounds[1] - bounds[0]
        ends = max(-most, estimate.value - unseen), min(most, estimate.value + unseen)
        return Difference(estimate.value, *ends, n, p, unseen)
    detectable = smallest_detectable(_spread(groups), n)
    return Difference(estimate.value, estimate.low, estimate.high, n, p, detectable)


def _unseen(bounds: tuple[float, float], n: int) -> float:
    """How much the mean may still have changed where none of `n` examples did: the share of examples that
    change could be this large (Clopper and Pearson for 0 of n), each by all that the bounds allow.
    """
    return float((bounds[1] - bounds[0]) * (1 - TAIL ** (1 / n)))


def _spread(groups: list[Floats]) -> float:
    """Standard deviation of the examples' differences, within their strata."""
    squares = sum(float(((own - own.mean()) ** 2).sum()) for own in groups)
    return float(np.sqrt(squares / max(1, sum(map(len, groups)) - len(groups))))


def signed_rank(differences: npt.ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; examples without a difference are dropped, and 1 is
    returned where none is left. Exact where there are no ties and at most 50 pairs.
    """
    data = np.asarray(differences, dtype=np.float64)
    data = data[np.isfinite(data) & (data != 0)]
    if not len(data):
        return 1.0
    ties = len(np.unique(np.abs(data))) < len(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of small samples; n is beside every p of ours
        exact = len(data) <= 50 and not ties
        return float(scipy_stats.wilcoxon(data, method="exact" if exact else "approx").pvalue)


def smallest_detectable(spread: float, n: int) -> float:
    """The mean difference that a two-sided paired t-test at the level of 5 % of `n` pairs whose differences have the standard
    deviation `spread` finds with a probability of 80 %. NaN where n < 3 or the spread is 0 or unknown.
    """
    if n < 3 or not spread > 0:
        return NAN
    freedom = n - 1
    critical = -special.stdtrit(freedom, LEVEL / 2)

    def excess(effect: float) -> float:
        within = special.nctdtr(freedom, effect, critical) - special.nctdtr(freedom, effect, -critical)
        return float(1 - np.nan_to_num(within) - POWER)  # NaN where it is too small to compute

    effect = optimize.brentq(excess, 1e-6, critical + 12, xtol=1e-6)
    return float(effect * spread / np.sqrt(n))


def ratio(
    values: npt.ArrayLike,
    baseline: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` over mean of `baseline` (1.3: 30 % more), whose elements belong together pair by
    pair.

    Examples are resampled with both of their values, within their stratum; tasks count equally in both
    means. The interval is the bootstrap's, expanded as that of `mean`; where no example differs and `bounds`
    are given, it is that of a change so rare that it stayed unseen, as in `difference`. An end is infinite where resampled
    baselines reach 0; NaN where the baseline's mean is not positive.
    """
    pairs = by_example([values, baseline], clusters, strata)
    if not pairs:
        return NOTHING
    generator = np.random.default_rng(seed)
    points, draws, sizes = np.zeros(2), np.zeros((2, resamples)), [pair.shape[1] for pair in pairs]
    for pair, size in zip(pairs, sizes, strict=True):
        points += pair.mean(axis=1) / len(pairs)
        draws += pair[:, generator.integers(0, size, (resamples, size))].mean(axis=2) / len(pairs)
    if not points[1] > 0:
        return Estimate(NAN, NAN, NAN, sum(sizes))
    point = float(points[0] / points[1])
    if min(sizes) < 2:
        return Estimate(point, NAN, NAN, sum(sizes))
    if bounds is not None and all(np.array_equal(own, base) for own, base in pairs):
        unseen = _unseen(bounds, sum(sizes)) / points[1]
        return Estimate(point, 1 - unseen, 1 + unseen, sum(sizes))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(draws[1] > 0, draws[0] / draws[1], np.inf)
    return Estimate(point, *expanded(point, drawn, min(sizes), "nearest"), sum(sizes))


def kept(
    score: npt.ArrayLike,
    baseline: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    *,
    resamples: int = 5 * RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of the baseline's mean score that is kept, from paired scores in 0..1; 1: nothing is lost.

    The mean loss (baseline minus score, an example's values averaged first, strata counting equally) is bounded as
    N. Gaffke does ("Three Test Statistics for a Nonparametric One-Sided Hypothesis on the Mean of a Nonnegative
    Variable", Mathematical Methods of Statistics 14(4), 2005): the ordered losses, and one unseen example that loses
    all, are weighed with the n + 1 gaps between n uniform values. Where examples lose nothing or all, this is Clopper
    and Pearson's limit. A bound rises with every loss: of two settings on the same examples, the one that loses at
    least as much in each never has the higher interval, whatever the draws (which they share). NaN where the
    baseline's mean is not positive.
    """
    pairs = by_example([score, baseline], clusters, strata)
    if not pairs:
        return NOTHING
    generator = np.random.default_rng(seed)
    reference = float(np.mean([base.mean() for _, base in pairs]))
    lost, most, least = 0.0, np.zeros(resamples), np.zeros(resamples)
    for own, base in pairs:
        ordered = np.sort(base - own)
        gaps = generator.dirichlet(np.ones(len(ordered) + 1), resamples)
        lost += float(ordered.mean()) / len(pairs)
        most += (gaps @ np.r_[ordered, 1.0]) / len(pairs)
        least += (gaps @ np.r_[-1.0, ordered]) / len(pairs)
    n = sum(len(own) for own, _ in pairs)
    if not reference > 0:
        return Estimate(NAN, NAN, NAN, n)
    worst, best = float(np.quantile(most, 1 - TAIL)), float(np.quantile(least, TAIL))
    return Estimate(1 - lost / reference, max(0.0, 1 - worst / reference), 1 - best / reference, n)


@dataclass(frozen=True)
class McNemar:
    """Examples that only one of two settings answered right, and the exact two-sided p that the two are
    equally good.
    """

    gained: int  #: wrong with the baseline, right with the other
    lost: int  #: right with the baseline, wrong with the other
    n: int
    p: float


def mcnemar(right: npt.ArrayLike, baseline: npt.ArrayLike) -> McNemar:
    """McNemar's test in its exact form (Q. McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", Psychometrika 12(2), 1947): pairs of 0 and 1; pairs with a value
    that is not finite are left out.
    """
    after, before = np.asarray(right, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    both = np.isfinite(after) & np.isfinite(before)
    now, then = after[both] >= 0.5, before[both] >= 0.5
    gained, lost = int((now & ~then).sum()), int((~now & then).sum())
    p = float(scipy_stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(gained, lost, int(both.sum()), p)


def holm(p: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The p-values of one family of comparisons, adjusted so that the chance of any false finding stays
    below the level (S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal
    of Statistics 6(2), 1979). NaN stays NaN and does not count as a comparison.
    """
    raw = np.asarray(p, dtype=np.float64)
    adjusted = np.full(raw.shape, np.nan)
    known = np.flatnonzero(np.isfinite(raw))
    order = known[np.argsort(raw[known], kind="stable")]
    steps = raw[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted
