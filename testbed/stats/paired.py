"""Two measurements of the same examples: their difference and what one keeps of the other, tested and bounded.

What is compared has met the same examples, so that an example's difficulty cancels out. Two tests say
whether the difference is there: Wilcoxon's signed-rank test (F. Wilcoxon, "Individual Comparisons by Ranking
Methods", Biometrics Bulletin 1(6), 1945) over examples, and the interval of the mean difference. Right
and wrong answers have McNemar's, and a family of such comparisons is adjusted by Holm's procedure.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, special
from scipy import stats as scipy_stats

from testbed.stats.estimates import NOTHING, RESAMPLES, Estimate, Floats, bounded, by_example, mean

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
    `bounds`: the least and largest possible value of either side. Pairs with a value that is not finite are left out.
    """
    change = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    within = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    estimate = mean(change, clusters, strata, bounds=within, resamples=resamples, seed=seed)
    groups = [own for (own,) in by_example([change], clusters, strata)]
    n = estimate.n
    if n < 2:
        return Difference(estimate.value, NAN, NAN, n, NAN, NAN)
    averaged, detectable = np.concatenate(groups), smallest_detectable(_spread(groups), n)
    if bounds is not None and np.ptp(averaged) == 0:  # what may stay unseen in so many
        detectable = estimate.high - estimate.value
    return Difference(estimate.value, estimate.low, estimate.high, n, signed_rank(averaged), detectable)


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

    The mean loss (baseline minus score, an example's values averaged first, strata counting equally) is `bounded`: where
    examples lose nothing or all, this is Clopper and Pearson's limit. Of two settings on the same examples, the one that loses
    at least as much in each never has the higher interval, whatever the draws (which they share). NaN where the baseline's
    mean is not positive.
    """
    pairs = by_example([score, baseline], clusters, strata)
    if not pairs:
        return NOTHING
    reference = float(np.mean([base.mean() for _, base in pairs]))
    losses = [base - own for own, base in pairs]
    n = sum(map(len, losses))
    if not reference > 0:
        return Estimate(NAN, NAN, NAN, n)
    best, worst = bounded(losses, (-1.0, 1.0), resamples, seed)
    lost = float(np.mean([loss.mean() for loss in losses]))
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
