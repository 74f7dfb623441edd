"""Several rows an example: what is resampled is the example, whatever its rows; and ratios against Fieller's interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from testbed import stats


def _clustered(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` examples of 1 to 6 rows each, alike within an example: values of mean 0, and the examples' labels."""
    examples = np.repeat(np.arange(n), rng.integers(1, 7, n))
    return rng.normal(0, 1, n)[examples] + rng.normal(0, 0.3, len(examples)), examples


def test_an_interval_over_clusters_is_scipys_over_the_examples_means() -> None:
    values, examples = _clustered(np.random.default_rng(1), 150)
    means = np.array([values[examples == example].mean() for example in range(150)])
    ours = stats.mean(values, examples, resamples=20_000)
    theirs = reference.bootstrap(
        (means,), np.mean, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    assert ours.value == pytest.approx(means.mean())
    assert ours.n == 150
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


@pytest.mark.slow
def test_an_interval_over_clusters_covers_the_truth_and_one_over_rows_does_not() -> None:
    rng = np.random.default_rng(3)
    drawn = [_clustered(rng, 30) for _ in range(2000)]
    own = [stats.mean(values, examples, resamples=300, seed=i) for i, (values, examples) in enumerate(drawn)]
    assert 0.93 <= np.mean([i.low <= 0 <= i.high for i in own]) <= 0.97
    rows = [stats.mean(values, resamples=200) for values, _ in drawn[:500]]
    assert np.mean([i.low <= 0 <= i.high for i in rows]) < 0.85


@pytest.mark.slow
def test_an_interval_over_clusters_of_two_tasks_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for seed in range(2000):
        values, examples = _clustered(rng, 40)
        tasks = np.where(examples < 25, "one", "other")
        truth = np.where(examples < 25, 0.5, -0.1)
        found = stats.mean(values + truth, examples, tasks, resamples=300, seed=seed)
        covered += found.low <= 0.2 <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_an_interval_of_a_ratio_is_fiellers() -> None:
    """E. C. Fieller, "Some Problems in Interval Estimation", J. R. Statist. Soc. B 16(2), 1954: the values r for which the
    mean of a − r b does not differ from 0."""
    rng = np.random.default_rng(5)
    b = rng.normal(2, 0.5, 400)
    a = 1.4 * b + rng.normal(0, 0.5, 400)
    t = reference.t.ppf(0.975, 399)
    (va, cab), (_, vb) = np.cov(a, b) / 400
    m, n = a.mean(), b.mean()
    square, half, rest = n**2 - t**2 * vb, m * n - t**2 * cab, m**2 - t**2 * va
    low, high = ((half + sign * np.sqrt(half**2 - square * rest)) / square for sign in (-1, 1))
    ours = stats.ratio(a, b, resamples=20_000)
    assert ours.value == pytest.approx(m / n)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_the_smallest_difference_that_darwins_maize_shows_has_a_power_of_80_percent() -> None:
    """The power of the paired t-test by the noncentral t distribution: at the smallest detectable difference it is 80 %."""
    darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    found = stats.difference(darwin, np.zeros(15)).detectable
    away = found / (np.std(darwin, ddof=1) / np.sqrt(15))
    critical = reference.t.ppf(0.975, 14)
    power = reference.nct.sf(critical, 14, away) + reference.nct.cdf(-critical, 14, away)
    assert power == pytest.approx(0.8, abs=1e-3)
    assert found == pytest.approx(29.3, abs=0.2)
