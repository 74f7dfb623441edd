"""Intervals of skewed losses, as codecs make them: mostly near 0, now and then large."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from testbed import stats
from testbed.analysis import comparisons

Draw = Callable[[np.random.Generator, int], np.ndarray]


def _lognormal(rng: np.random.Generator, n: int) -> np.ndarray:
    return 0.05 * rng.lognormal(0, 1, n)


def _gamma(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.gamma(1, 0.1, n)


def _mixture(rng: np.random.Generator, n: int) -> np.ndarray:
    """A fifth of the examples lose half a nat on average; the others are unharmed but for noise."""
    return rng.normal(0, 0.02, n) + (rng.random(n) < 0.2) * rng.exponential(0.5, n)


def _rare(rng: np.random.Generator, n: int) -> np.ndarray:
    """One example in fifty loses two nats: a mean of 0.04, and most samples of 50 have one or none of them."""
    return rng.normal(0, 0.01, n) + 2.0 * (rng.random(n) < 0.02)


TRUTHS: dict[Draw, float] = {_lognormal: 0.05 * np.exp(0.5), _gamma: 0.1, _mixture: 0.1}


def _misses(draw: Draw, truth: float, n: int, samples: int) -> tuple[float, float]:
    """The share of samples whose interval ends below the truth ("nothing lost"), and begins above it."""
    rng = np.random.default_rng(n)
    found = [stats.mean(draw(rng, n), resamples=1000, seed=i) for i in range(samples)]
    return float(np.mean([e.high < truth for e in found])), float(np.mean([e.low > truth for e in found]))


def test_the_interval_of_a_skewed_mean_follows_the_skewness_as_theory_says() -> None:
    """P. Hall, "The Bootstrap and Edgeworth Expansion", 1992, section 3.3: bootstrap-t's upper end is
    mean + s / sqrt(n) (z + skewness (2 z^2 + 1) / (6 sqrt(n))) to second order; BCa's is, to the same order, nearer."""
    values = np.random.default_rng(1).gamma(2, 1, 400)
    n, error, z = 400, values.std(ddof=1) / 20, reference.norm.ppf(0.975)
    ours = stats.mean(values, resamples=20_000)
    expected = values.mean() + error * (z + reference.skew(values) * (2 * z * z + 1) / (6 * np.sqrt(n)))
    assert ours.high == pytest.approx(expected, abs=0.06 * error)
    bca = reference.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=2).confidence_interval
    assert bca.high == pytest.approx(ours.high, abs=0.2 * error)
    assert bca.low == pytest.approx(ours.low, abs=0.2 * error)


def test_the_interval_of_a_skewed_mean_misses_less_often_than_scipys_on_the_side_that_says_lossless() -> None:
    rng = np.random.default_rng(3)
    samples = [_mixture(rng, 20) for _ in range(400)]
    ours = np.mean([stats.mean(x, resamples=1000).high < 0.1 for x in samples])
    for method in ("BCa", "percentile"):
        drawn = reference.bootstrap(
            (np.array(samples),), np.mean, axis=1, method=method, n_resamples=1000, rng=4
        )
        assert ours < np.mean(drawn.confidence_interval.high < 0.1) - 0.03, method


def test_an_interval_over_two_tasks_of_skewed_losses_covers_their_mean() -> None:
    rng = np.random.default_rng(5)
    tasks = np.repeat(["one", "other"], [20, 30])
    covered = 0
    for seed in range(600):
        values = np.concatenate([_lognormal(rng, 20), _gamma(rng, 30)])
        found = stats.mean(values, None, tasks, resamples=500, seed=seed)
        covered += found.low <= (TRUTHS[_lognormal] + 0.1) / 2 <= found.high
    assert 0.93 <= covered / 600 <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least"), [(6, 0.64), (20, 0.88), (50, 0.93)])
@pytest.mark.parametrize("draw", list(TRUTHS), ids=lambda draw: draw.__name__.strip("_"))
def test_intervals_of_skewed_means_hold_the_truth(draw: Draw, n: int, least: float) -> None:
    """Six examples of the mixture mostly hold one harmed example or none: no interval can know of more."""
    below, above = _misses(draw, TRUTHS[draw], n, 1000)
    assert 1 - below - above >= (least if draw is _mixture or n > 6 else 0.87)
    assert above <= 0.03


def test_the_share_of_losers_is_bounded_as_clopper_and_pearson_do() -> None:
    """Published by Clopper and Pearson's charts and R's binom.test(2, 50): 0.0049 to 0.1371."""
    values = np.r_[np.zeros(48), 0.5, 3.0]
    found = stats.share_above(values, 0.1)
    assert (found.value, found.n) == (0.04, 50)
    assert (found.low, found.high) == (pytest.approx(0.0049, abs=5e-5), pytest.approx(0.1371, abs=5e-5))
    none = stats.share_above(np.zeros(50), 0.1)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_an_examples_rows_are_one_loss() -> None:
    found = stats.share_above([0.5, 0.5, 0.0, np.nan], 0.1, ["a", "a", "b", "c"])
    assert (found.value, found.n) == (0.5, 2)
    assert np.isnan(stats.share_above([np.nan], 0.1).value)


def _passes(draw: Draw, n: int, samples: int = 300) -> float:
    """How often the rule of what is lossless lets samples of this loss pass."""
    rng, passed = np.random.default_rng(n), 0
    for _ in range(samples):
        lost = draw(rng, n)
        pairs = pd.DataFrame(
            {"nll": lost, "nll_base": 0.0, "score": 1.0, "score_base": 1.0, "kl": 0.0, "task": "qa"}
        )
        pairs["example"] = [str(i) for i in range(n)]
        passed += comparisons.compare(pairs, "m", "qa", "codec", comparisons.FULL).lossless
    return passed / samples


@pytest.mark.slow
def test_rare_large_losses_pass_as_lossless_only_where_the_sample_holds_none_or_next_to_none() -> None:
    """Of losses with a mean above the margin: one in 25 examples loses a nat, or one in 10 a quarter of one."""

    def some(rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.normal(0, 0.01, n) + (rng.random(n) < 0.04)

    def many(rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.normal(0, 0.01, n) + 0.25 * (rng.random(n) < 0.1)

    for n in (50, 100):
        assert _passes(some, n) <= 0.96**n + 0.05
        assert _passes(many, n) <= 0.025
    assert _passes(_rare, 100) <= 0.98**100 + 0.05


@pytest.mark.slow
def test_a_codec_that_only_rounds_is_shown_to_be_lossless_by_fifty_examples_and_not_by_thirty() -> None:
    def rounds(rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.normal(0.002, 0.015, n)

    assert _passes(rounds, 50) >= 0.95
    assert _passes(rounds, 30) == 0.0
