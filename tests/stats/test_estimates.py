"""Estimates against scipy, plain loops and simulated truth; what is resampled is the example, whatever its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as reference

from testbed import stats
from testbed.stats import estimates

Draw = Callable[[np.random.Generator, int], np.ndarray]


def clustered(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` examples of 1 to 6 rows each, alike within an example: values of mean 0, and the examples' labels."""
    examples = np.repeat(np.arange(n), rng.integers(1, 7, n))
    return rng.normal(0, 1, n)[examples] + rng.normal(0, 0.3, len(examples)), examples


BETA = np.random.default_rng(1).beta(2, 1, 200)  # at n = 200 the small-sample correction is within noise
LOGNORMAL = np.random.default_rng(4).lognormal(0, 0.5, 41)
VALUES, EXAMPLES = clustered(np.random.default_rng(1), 150)
MEANS = np.array([VALUES[example == EXAMPLES].mean() for example in range(150)])


@pytest.mark.parametrize(
    ("ours", "sample", "statistic"),
    [
        (stats.mean(VALUES, EXAMPLES, resamples=20_000), MEANS, np.mean),
        (stats.median(LOGNORMAL, resamples=20_000), LOGNORMAL, np.median),
    ],
    ids=["mean of clusters", "median"],
)
def test_an_estimate_and_its_interval_agree_with_scipys_percentile_bootstrap(
    ours: stats.Estimate, sample: np.ndarray, statistic: Callable
) -> None:
    theirs = reference.bootstrap((sample,), statistic, method="percentile", n_resamples=20_000, rng=2)
    low, high = theirs.confidence_interval
    assert (ours.value, ours.n) == (pytest.approx(statistic(sample)), len(sample))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_small_samples_get_intervals_as_wide_as_students() -> None:
    values = np.random.default_rng(3).normal(0, 1, 10)
    ours = stats.mean(values, resamples=50_000)
    low, high = reference.t.interval(0.95, 9, values.mean(), values.std(ddof=1) / np.sqrt(10))
    assert 0.97 <= (ours.high - ours.low) / (high - low) <= 1.15


def test_weighted_medians_equal_the_median_of_the_repeated_values() -> None:
    rng = np.random.default_rng(6)
    ordered = np.sort(rng.normal(size=9))
    weights = rng.integers(0, 4, (50, 9))
    weights[:, 0] += weights.sum(axis=1) == 0
    expected = [np.median(np.repeat(ordered, w)) for w in weights]
    np.testing.assert_allclose(estimates._weighted_medians(ordered, weights), expected)


@pytest.mark.parametrize("estimate", [stats.mean, stats.median])
def test_repeating_an_examples_rows_does_not_narrow_the_interval_and_the_same_rows_give_the_same(
    estimate,
) -> None:
    values, examples = np.random.default_rng(7).random(20), np.arange(20)
    once = estimate(values, examples)
    assert once == estimate(values, examples)
    often = estimate(np.repeat(values, 10), np.repeat(examples, 10))
    assert (often.low, often.high, often.n) == (pytest.approx(once.low), pytest.approx(once.high), 20)


def test_each_example_and_each_task_counts_once_in_a_mean() -> None:
    assert stats.mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.5
    over_tasks = stats.mean([1.0, 1.0, 1.0, 0.0, 0.0], None, ["x", "x", "x", "y", "y"])
    assert (over_tasks.value, over_tasks.n) == (0.5, 5)
    share = stats.share_above([0.5, 0.5, 0.0, np.nan], 0.1, ["a", "a", "b", "c"])
    assert (share.value, share.n) == (0.5, 2)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (1, 12), (49, 50), (3, 7), (96, 200)])
def test_an_interval_of_answers_that_are_right_or_wrong_is_clopper_and_pearsons(right: int, n: int) -> None:
    ours = stats.mean(np.arange(n) < right, bounds=(0, 1), resamples=50_000)
    theirs = reference.binomtest(right, n).proportion_ci(method="exact")
    assert (ours.value, ours.n) == (right / n, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_an_interval_of_many_scores_is_scipys_bootstrap_and_what_stayed_unseen() -> None:
    ours = stats.mean(BETA, bounds=(0, 1), resamples=20_000)
    theirs = reference.bootstrap((BETA,), np.mean, n_resamples=20_000, rng=2).confidence_interval
    assert ours.value == pytest.approx(BETA.mean())
    assert theirs.low - 0.01 <= ours.low <= theirs.low + 2e-3
    assert theirs.high - 2e-3 <= ours.high <= theirs.high + 0.01


@pytest.mark.parametrize("n", [6, 20, 50])
def test_a_setting_that_lost_an_answer_never_has_the_higher_interval(n: int) -> None:
    rng = np.random.default_rng(n)
    full, tasks = rng.choice([0.3, 1.0], n), np.repeat(["one", "other"], [n // 3, n - n // 3])
    for lost in range(4):
        better, worse = (np.where(np.arange(n) < k, 0.0, full) for k in (lost, lost + 1))
        for a, b in (
            [stats.mean(x, None, tasks, bounds=(0, 1)) for x in (worse, better)],
            [stats.difference(x, full, None, tasks, bounds=(0, 1)) for x in (worse, better)],
        ):
            assert a.value < b.value and a.low <= b.low and a.high <= b.high


@pytest.mark.parametrize("right", [0.85, 0.93, 0.98])
def test_scores_near_the_ceiling_are_covered(right: float) -> None:
    """A percentile interval of 49 right answers of 50 ends at 0.94: of a setting that is right in 93 % it would be wrong in
    one sample of ten."""
    rng = np.random.default_rng(3)
    found = [stats.mean(rng.random(50) < right, bounds=(0, 1), resamples=500, seed=i) for i in range(1000)]
    assert np.mean([e.low > right for e in found]) <= 0.035
    assert np.mean([e.high < right for e in found]) <= 0.035


@pytest.mark.parametrize("estimate", [stats.mean, stats.median])
def test_too_little_data_gives_no_interval(estimate) -> None:
    nothing = estimate([])
    assert (nothing.n, nothing.text()) == (0, "-")
    single = estimate([0.25, float("nan")])
    assert (single.value, single.n, single.text()) == (0.25, 1, "0.25")
    assert np.isnan([single.low, single.high]).all()
    assert np.isnan(stats.share_above([np.nan], 0.1).value)


def beta(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.beta(2, 1, n)  # skewed towards right answers, mean 2/3


def binary(rng: np.random.Generator, n: int) -> np.ndarray:
    return (rng.random(n) < 0.7).astype(float)


def lognormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return 0.05 * rng.lognormal(0, 1, n)


def gamma(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.gamma(1, 0.1, n)


def mixture(rng: np.random.Generator, n: int) -> np.ndarray:
    """A fifth of the examples lose half a nat on average; the others are unharmed but for noise."""
    return rng.normal(0, 0.02, n) + (rng.random(n) < 0.2) * rng.exponential(0.5, n)


TRUTHS: dict[Draw, float] = {lognormal: 0.05 * np.exp(0.5), gamma: 0.1, mixture: 0.1}


def of_tasks(
    rng: np.random.Generator, first: Draw, second: Draw, sizes: tuple[int, int], **more
) -> stats.Estimate:
    """The mean over two tasks, of which each has its own values."""
    values = np.concatenate([first(rng, sizes[0]), second(rng, sizes[1])])
    return stats.mean(values, None, np.repeat(["one", "other"], sizes), **more)


def of_clusters(rng: np.random.Generator, seed: int) -> stats.Estimate:
    """The mean over two tasks of examples with several rows: 0.5 and -0.1."""
    values, examples = clustered(rng, 40)
    first = examples < 25
    tasks = np.where(first, "one", "other")
    return stats.mean(values + np.where(first, 0.5, -0.1), examples, tasks, resamples=300, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "truth", "estimate"),
    [
        (9, 1.0, lambda rng, i: stats.mean(rng.normal(1, 1, 20), resamples=1000, seed=i)),
        (9, 2 / 3, lambda rng, i: stats.mean(beta(rng, 30), bounds=(0, 1), resamples=1000, seed=i)),
        (9, 0.7, lambda rng, i: stats.mean(binary(rng, 50), bounds=(0, 1), resamples=1000, seed=i)),
        (10, (2 / 3 + 0.7) / 2, lambda rng, i: of_tasks(rng, beta, binary, (25, 25), bounds=(0, 1), resamples=1000, seed=i)),
        (5, (TRUTHS[lognormal] + 0.1) / 2, lambda rng, i: of_tasks(rng, lognormal, gamma, (20, 30), resamples=500, seed=i)),
        (3, 0.0, lambda rng, i: stats.mean(*clustered(rng, 30), resamples=300, seed=i)),
        (4, 0.2, of_clusters),
        (11, 1.0, lambda rng, i: stats.median(rng.lognormal(0, 0.5, 40), resamples=1000, seed=i)),
        (10, np.exp(0.5 * reference.norm.ppf(0.95)), lambda rng, i: stats.quantile(rng.lognormal(0, 0.5, 150), 0.95)),
    ],
    ids=["normal", "beta", "binary", "two tasks", "skewed tasks", "clusters", "tasks of clusters", "median", "p95"],
)  # fmt: skip
def test_a_95_percent_interval_covers_the_truth_95_times_of_100(seed: int, truth: float, estimate) -> None:
    """Order statistics are discrete, and skewed means bounded with care: at least 95, never exactly."""
    rng = np.random.default_rng(seed)
    found = [estimate(rng, i) for i in range(2000)]
    assert 0.93 <= np.mean([e.low <= truth <= e.high for e in found]) <= 0.985


@pytest.mark.slow
def test_an_interval_over_rows_of_clusters_covers_too_little() -> None:
    rng = np.random.default_rng(3)
    rows = [stats.mean(clustered(rng, 30)[0], resamples=200) for _ in range(500)]
    assert np.mean([e.low <= 0 <= e.high for e in rows]) < 0.85


def test_the_interval_of_a_skewed_mean_follows_the_skewness_as_theory_says() -> None:
    """P. Hall, "The Bootstrap and Edgeworth Expansion", 1992, section 3.3: bootstrap-t's upper end is
    mean + s / sqrt(n) (z + skewness (2 z^2 + 1) / (6 sqrt(n))) to second order; BCa's is, to the same order, nearer."""
    values = np.random.default_rng(1).gamma(2, 1, 400)
    n, error, z = 400, values.std(ddof=1) / 20, reference.norm.ppf(0.975)
    ours = stats.mean(values, resamples=20_000)
    expected = values.mean() + error * (z + reference.skew(values) * (2 * z * z + 1) / (6 * np.sqrt(n)))
    assert ours.high == pytest.approx(expected, abs=0.06 * error)
    bca = reference.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=2).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((bca.low, bca.high), abs=0.2 * error)


def test_the_interval_of_a_skewed_mean_misses_less_often_than_scipys_on_the_side_that_says_lossless() -> None:
    rng = np.random.default_rng(3)
    samples = np.array([mixture(rng, 20) for _ in range(400)])
    ours = np.mean([stats.mean(x, resamples=1000).high < 0.1 for x in samples])
    for method in ("BCa", "percentile"):
        drawn = reference.bootstrap((samples,), np.mean, axis=1, method=method, n_resamples=1000, rng=4)
        assert ours < np.mean(drawn.confidence_interval.high < 0.1) - 0.03, method


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(6, 0.64), (20, 0.88), (50, 0.93)])
@pytest.mark.parametrize("draw", list(TRUTHS), ids=lambda draw: draw.__name__)
def test_intervals_of_skewed_means_hold_the_truth(draw: Draw, n: int, least: float) -> None:
    """Six examples of the mixture mostly hold one harmed example or none: no interval can know of more."""
    rng, truth = np.random.default_rng(n), TRUTHS[draw]
    found = [stats.mean(draw(rng, n), resamples=1000, seed=i) for i in range(1000)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= (least if draw is mixture or n > 6 else 0.87)
    assert np.mean([e.low > truth for e in found]) <= 0.03


def test_the_share_of_losers_is_bounded_as_clopper_and_pearson_do() -> None:
    """Published by Clopper and Pearson's charts and R's binom.test(2, 50): 0.0049 to 0.1371."""
    found = stats.share_above(np.r_[np.zeros(48), 0.5, 3.0], 0.1)
    assert (found.value, found.n) == (0.04, 50)
    assert (found.low, found.high) == (pytest.approx(0.0049, abs=5e-5), pytest.approx(0.1371, abs=5e-5))
    none = stats.share_above(np.zeros(50), 0.1)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_twenty_requests_cannot_bound_the_95th_percentile_from_above() -> None:
    assert stats.quantile(np.arange(20.0), 0.95).high == float("inf")
    assert stats.quantile(np.arange(80.0), 0.95).high == 79.0
    several = stats.quantile(np.arange(40.0), 0.95, np.repeat(np.arange(20), 2))
    assert several.high == float("inf")


def test_an_interval_of_the_median_by_order_statistics_is_conovers() -> None:
    # W. J. Conover, "Practical Nonparametric Statistics", section 3.2, for n = 20, q = 0.5: the 6th and the
    # 15th values enclose the median with 95.9 %.
    found = stats.quantile(np.arange(1.0, 21.0), 0.5)
    assert (found.low, found.high) == (6.0, 15.0)


def test_the_front_has_every_point_that_no_other_beats() -> None:
    rng = np.random.default_rng(12)
    for _ in range(50):
        cost, gain = rng.integers(0, 8, 12), rng.integers(0, 8, 12)  # few values, so that there are ties
        expected = {
            i
            for i in range(12)
            if not any(
                cost[j] <= cost[i] and gain[j] >= gain[i] and (cost[j] < cost[i] or gain[j] > gain[i])
                for j in range(12)
            )
        }
        front = stats.pareto_front(cost, gain)
        assert set(front.tolist()) == expected
        assert list(cost[front]) == sorted(cost[front])
    assert stats.pareto_front([1, float("nan"), 2], [float("nan"), 9, 1]).tolist() == [2]
    assert stats.pareto_front([], []).size == 0
