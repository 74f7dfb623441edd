"""Paired comparisons against scipy, statsmodels, published worked examples and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from testbed import stats

# C. Darwin's pairs of cross- and self-fertilised maize, differences in eighths of an inch (R. A. Fisher, "The
# Design of Experiments", 1935, section 17). Mean 20.93; Fisher's t = 2.148 on 14 degrees of freedom.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_the_mean_difference_of_darwins_maize_is_fishers() -> None:
    found = stats.difference(DARWIN, np.zeros(15), resamples=20_000)
    assert found.value == pytest.approx(20.93, abs=0.01)
    low, high = reference.t.interval(0.95, 14, np.mean(DARWIN), np.std(DARWIN, ddof=1) / np.sqrt(15))
    # Two of the fifteen are far below the rest: the interval reaches further down than Student's, not up.
    assert low - 15 <= found.low <= low + 1
    assert found.high == pytest.approx(high, abs=3.5)


def test_the_signed_rank_test_of_darwins_maize_is_the_published_one() -> None:
    # The rank sum of the negative differences is 24 (8 is untied); the exact two-sided p is 0.0413 (scipy's
    # manual has the same example).
    assert stats.signed_rank(DARWIN) == pytest.approx(0.0413, abs=5e-5)
    assert stats.difference(DARWIN, np.zeros(15)).p == pytest.approx(0.0413, abs=5e-5)


def test_examples_without_a_difference_say_nothing_in_the_signed_rank_test() -> None:
    assert stats.signed_rank([*DARWIN, 0, 0, 0]) == stats.signed_rank(DARWIN)
    assert stats.signed_rank([0.0, 0.0]) == 1.0


def test_the_smallest_detectable_difference_agrees_with_statsmodels() -> None:
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is not installed")
    for n in (5, 20, 100):
        effect = power.TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        assert stats.smallest_detectable(2.0, n) == pytest.approx(2 * effect, rel=1e-3)


def test_the_smallest_detectable_difference_is_found_in_80_of_100_simulations() -> None:
    rng = np.random.default_rng(1)
    effect = stats.smallest_detectable(1.0, 25)
    found = reference.ttest_1samp(rng.normal(effect, 1, (4000, 25)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_mcnemars_test_agrees_with_statsmodels_and_the_table_of_agresti() -> None:
    # A. Agresti, "Categorical Data Analysis", 2nd edition, table 10.1: approval ratings of a prime minister in
    # two surveys, 150 of 1,600 changed to disapproval and 86 to approval.
    before = np.repeat([1, 1, 0, 0], [794, 150, 86, 570])
    after = np.repeat([1, 0, 1, 0], [794, 150, 86, 570])
    found = stats.mcnemar(after, before)
    assert (found.gained, found.lost, found.n) == (86, 150, 1600)
    assert found.p == pytest.approx(3.7e-5, rel=0.05)
    tables = pytest.importorskip("statsmodels.stats.contingency_tables", reason="no statsmodels")
    assert found.p == pytest.approx(tables.mcnemar([[794, 150], [86, 570]], exact=True).pvalue)


def test_holms_correction_agrees_with_statsmodels_and_a_hand_computation() -> None:
    # By hand: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, each at least as large as the one before.
    np.testing.assert_allclose(stats.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    p = np.random.default_rng(2).random(20) ** 3
    np.testing.assert_allclose(stats.holm(p), multitest.multipletests(p, method="holm")[1])
    assert np.isnan(stats.holm([0.01, np.nan])[1])
    assert stats.holm([0.01, np.nan])[0] == 0.01
    assert stats.holm([]).size == 0


def test_the_interval_of_a_difference_agrees_with_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.beta(2, 1, 150), rng.beta(1, 1, 150)
    ours = stats.difference(a, b, resamples=20_000)
    theirs = reference.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=4,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(
        (theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low)
    )


def test_the_interval_of_a_ratio_agrees_with_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(5)
    b = rng.beta(2, 2, 200)
    a = np.clip(b + rng.normal(0.1, 0.1, 200), 0, 1)
    ours = stats.ratio(a, b, resamples=20_000)
    theirs = reference.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) / y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=6,
    ).confidence_interval
    assert ours.value == pytest.approx(a.mean() / b.mean())
    assert (ours.low, ours.high) == pytest.approx(
        (theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low)
    )


def test_rows_of_one_example_count_once_in_differences_and_ratios() -> None:
    rng = np.random.default_rng(7)
    a, b, examples = rng.random(20), rng.random(20), np.arange(20)
    often = [np.repeat(x, 6) for x in (a, b, examples)]
    assert stats.difference(*often).low == pytest.approx(stats.difference(a, b, examples).low)
    assert stats.difference(*often).p == pytest.approx(stats.difference(a, b, examples).p)
    assert stats.difference(*often).detectable == pytest.approx(stats.difference(a, b, examples).detectable)
    assert stats.ratio(*often).high == pytest.approx(stats.ratio(a, b, examples).high)


def test_equal_scores_do_not_claim_certainty() -> None:
    found = stats.difference(np.ones(30), np.ones(30), bounds=(0, 1))
    assert found.value == 0
    # Clopper and Pearson's upper limit for 0 of 30: 1 - 0.025^(1/30).
    assert found.high == pytest.approx(reference.binomtest(0, 30).proportion_ci().high)
    assert (found.low, found.p) == (-found.high, 1.0)


def test_a_ratio_over_nothing_has_no_value() -> None:
    assert np.isnan(stats.ratio([1, 1], [0, 0]).value)
    assert stats.ratio([1, 1, 1, 1], [0, 0, 0, 1]).high == float("inf")
    assert stats.ratio([], []).n == 0


def test_pairs_with_a_gap_are_left_out() -> None:
    found = stats.difference([1, 2, np.nan, 4], [0, 1, 2, np.nan])
    assert (found.value, found.n) == (1.0, 2)


def test_one_pair_has_no_interval() -> None:
    found = stats.difference([1.0], [0.5])
    assert (found.value, found.n) == (0.5, 1)
    assert np.isnan([found.low, found.high, found.p, found.detectable]).all()


def _scores(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two settings to examples of different difficulty: means 0.6 and 0.4."""
    easy = rng.random(n)
    return (easy < 0.6).astype(float), (easy + rng.choice([-0.1, 0.1], n) < 0.4).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("n", [25, 60])
def test_a_95_percent_interval_of_a_difference_covers_the_truth_95_times_of_100(n: int) -> None:
    rng = np.random.default_rng(8)
    found = []
    for seed in range(2000):
        a, b = _scores(rng, n)
        found.append(stats.difference(a, b, bounds=(0, 1), resamples=1000, seed=seed))
    assert 0.93 <= np.mean([i.low <= 0.2 <= i.high for i in found]) <= 0.97


@pytest.mark.slow
def test_a_95_percent_interval_of_a_ratio_covers_the_truth_95_times_of_100() -> None:
    rng = np.random.default_rng(9)
    found = [stats.ratio(*_scores(rng, 60), resamples=500, seed=seed) for seed in range(2000)]
    assert 0.93 <= np.mean([i.low <= 1.5 <= i.high for i in found]) <= 0.97


@pytest.mark.slow
def test_an_interval_of_the_95th_percentile_covers_the_truth() -> None:
    rng = np.random.default_rng(10)
    truth = float(np.exp(0.5 * reference.norm.ppf(0.95)))
    found = [stats.quantile(rng.lognormal(0, 0.5, 150), 0.95) for _ in range(2000)]
    covered = np.mean([i.low <= truth <= i.high for i in found])
    assert 0.93 <= covered <= 0.985  # order statistics are discrete: at least 95, never exactly


def test_twenty_requests_cannot_bound_the_95th_percentile_from_above() -> None:
    found = stats.quantile(np.arange(20.0), 0.95)
    assert found.high == float("inf")
    assert stats.quantile(np.arange(80.0), 0.95).high == 79.0
    several = stats.quantile(np.arange(40.0), 0.95, np.repeat(np.arange(20), 2))
    assert several.high == float("inf")


def test_an_interval_of_the_median_by_order_statistics_is_conovers() -> None:
    # W. J. Conover, "Practical Nonparametric Statistics", section 3.2, for n = 20, q = 0.5: the 6th and the
    # 15th values enclose the median with 95.9 %.
    found = stats.quantile(np.arange(1.0, 21.0), 0.5)
    assert (found.low, found.high) == (6.0, 15.0)
