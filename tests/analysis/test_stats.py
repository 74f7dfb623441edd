"""Estimates against scipy, plain loops and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from testbed import stats
from testbed.stats import estimates


def test_a_bounded_mean_and_its_interval_agree_with_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).beta(
        2, 1, 200
    )  # at n = 200 the small-sample correction is within noise
    ours = stats.mean(values, bounds=(0, 1), resamples=20_000)
    theirs = reference.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_small_samples_get_intervals_as_wide_as_students() -> None:
    values = np.random.default_rng(3).normal(0, 1, 10)
    ours = stats.mean(values, resamples=50_000)
    low, high = reference.t.interval(0.95, 9, values.mean(), values.std(ddof=1) / np.sqrt(10))
    assert 0.97 <= (ours.high - ours.low) / (high - low) <= 1.15


def test_the_median_and_its_interval_agree_with_scipy() -> None:
    values = np.random.default_rng(4).lognormal(0, 0.5, 41)
    ours = stats.median(values, resamples=20_000)
    theirs = reference.bootstrap((values,), np.median, method="percentile", n_resamples=20_000, rng=5)
    assert ours.value == np.median(values)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, rel=0.03)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, rel=0.03)


def test_weighted_medians_equal_the_median_of_the_repeated_values() -> None:
    rng = np.random.default_rng(6)
    ordered = np.sort(rng.normal(size=9))
    weights = rng.integers(0, 4, (50, 9))
    weights[:, 0] += weights.sum(axis=1) == 0
    expected = [np.median(np.repeat(ordered, w)) for w in weights]
    np.testing.assert_allclose(estimates._weighted_medians(ordered, weights), expected)


def test_repeating_an_examples_rows_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(7).random(20)
    examples = np.arange(20)
    once = stats.mean(values, examples)
    often = stats.mean(np.repeat(values, 10), np.repeat(examples, 10))
    assert (often.low, often.high, often.n) == (pytest.approx(once.low), pytest.approx(once.high), 20)
    once, often = stats.median(values, examples), stats.median(np.repeat(values, 10), np.repeat(examples, 10))
    assert (often.low, often.high, often.n) == (once.low, once.high, 20)


def test_each_example_counts_once_in_the_mean() -> None:
    assert stats.mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.5


def test_each_task_counts_once_in_the_mean_over_tasks() -> None:
    estimate = stats.mean([1.0, 1.0, 1.0, 0.0, 0.0], None, ["x", "x", "x", "y", "y"])
    assert estimate.value == 0.5
    assert estimate.n == 5


def test_all_right_answers_do_not_claim_certainty() -> None:
    # Clopper and Pearson for 20 of 20: the lower limit solves p^20 = 0.025.
    estimate = stats.mean(np.ones(20), bounds=(0, 1), resamples=100_000)
    tail = estimates._tails(20, 0.95)[0]
    assert estimate.low == pytest.approx(tail ** (1 / 20), abs=0.01)
    assert estimate.low <= 0.025 ** (1 / 20) + 0.005
    assert estimate.high == 1.0
    estimate = stats.mean(np.zeros(20), bounds=(0, 1))
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert 0.1 < estimate.high < 0.25


def test_the_same_rows_give_the_same_interval() -> None:
    values = np.random.default_rng(8).random(30)
    assert stats.mean(values) == stats.mean(values)
    assert stats.median(values) == stats.median(values)


@pytest.mark.parametrize("estimate", [stats.mean, stats.median])
def test_too_little_data_gives_no_interval(estimate) -> None:
    nothing = estimate([])
    assert np.isnan(nothing.value)
    assert nothing.n == 0
    one = estimate([0.25, float("nan")])
    assert (one.value, one.n) == (0.25, 1)
    assert np.isnan(one.low)
    assert np.isnan(one.high)


def _beta(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.beta(2, 1, n)  # skewed towards right answers, mean 2/3


def _binary(rng: np.random.Generator, n: int) -> np.ndarray:
    return (rng.random(n) < 0.7).astype(float)


def _normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(1, 1, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "truth", "n", "bounds"),
    [(_normal, 1.0, 20, None), (_beta, 2 / 3, 30, (0, 1)), (_binary, 0.7, 50, (0, 1))],
    ids=["normal", "beta", "binary"],
)
def test_a_95_percent_interval_of_the_mean_covers_the_truth_95_times_of_100(
    draw, truth: float, n: int, bounds: tuple[float, float] | None
) -> None:
    rng = np.random.default_rng(9)
    intervals = [stats.mean(draw(rng, n), bounds=bounds, resamples=1000, seed=i) for i in range(2000)]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
def test_an_interval_over_two_tasks_covers_their_mean() -> None:
    rng = np.random.default_rng(10)
    tasks = np.repeat(["f1", "exact"], 25)
    found = [
        stats.mean(
            np.concatenate([_beta(rng, 25), _binary(rng, 25)]),
            None,
            tasks,
            bounds=(0, 1),
            resamples=1000,
            seed=i,
        )
        for i in range(2000)
    ]
    assert 0.93 <= np.mean([i.low <= (2 / 3 + 0.7) / 2 <= i.high for i in found]) <= 0.97


@pytest.mark.slow
def test_an_interval_of_the_median_covers_the_truth() -> None:
    rng = np.random.default_rng(11)
    found = [stats.median(rng.lognormal(0, 0.5, 40), resamples=1000, seed=i) for i in range(2000)]
    assert 0.93 <= np.mean([i.low <= 1.0 <= i.high for i in found]) <= 0.97


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


def test_points_without_a_value_are_not_on_the_front() -> None:
    assert stats.pareto_front([1, float("nan"), 2], [float("nan"), 9, 1]).tolist() == [2]
    assert stats.pareto_front([], []).size == 0
