"""Right and wrong answers, and families of comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from testbed.stats.estimates import CONFIDENCE, NOTHING, Estimate, _clean, by_example


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


def share_above(
    values: npt.ArrayLike,
    limit: float,
    clusters: npt.ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The share of examples whose value (mean over an example's values) is above `limit`, with the exact
    binomial interval (C. Clopper and E. Pearson, "The Use of Confidence or Fiducial Limits Illustrated in
    the Case of the Binomial", Biometrika 26(4), 1934).

    It says what a mean cannot: of 50 examples that lose nothing, up to 7 in 100 like them may lose any
    amount. Values that are not finite are left out.
    """
    labels = np.arange(np.size(values)) if clusters is None else clusters
    data, (examples,) = _clean(values, labels)
    if not len(data):
        return NOTHING
    ((averaged,),) = by_example([data], examples, np.zeros(len(data), dtype=int))
    above, n = int((averaged > limit).sum()), len(averaged)
    interval = scipy_stats.binomtest(above, n).proportion_ci(confidence, method="exact")
    return Estimate(above / n, float(interval.low), float(interval.high), n)


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
