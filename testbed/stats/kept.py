"""What a setting keeps of its baseline's score, bounded so that losing more never looks better."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from testbed.stats.estimates import CONFIDENCE, NOTHING, RESAMPLES, Estimate, by_example


def kept(
    score: npt.ArrayLike,
    baseline: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    strata: npt.ArrayLike | None = None,
    *,
    confidence: float = CONFIDENCE,
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
    after, before = np.asarray(score, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    labels = np.arange(np.size(after)) if clusters is None else np.asarray(clusters)
    groups = np.zeros(np.size(after), dtype=int) if strata is None else np.asarray(strata)
    both = np.isfinite(after) & np.isfinite(before)
    if not both.any():
        return NOTHING
    pairs = by_example([after[both], before[both]], labels[both], groups[both])
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
        return Estimate(float("nan"), float("nan"), float("nan"), n)
    tail = (1 - confidence) / 2
    worst, best = float(np.quantile(most, 1 - tail)), float(np.quantile(least, tail))
    return Estimate(1 - lost / reference, max(0.0, 1 - worst / reference), 1 - best / reference, n)
