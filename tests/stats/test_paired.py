"""Paired comparisons, and what is kept, against scipy, statsmodels, published worked examples and simulated truth."""

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
    rng = np.random.default_rng(5)
    b = rng.beta(2, 2, 200)
    a = np.clip(b + rng.normal(0.1, 0.1, 200), 0, 1)
    settings = {"paired": True, "method": "percentile", "n_resamples": 20_000, "rng": 6}
    low, high = reference.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), **settings
    ).confidence_interval
    found = stats.difference(a, b, resamples=20_000)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_the_smallest_difference_that_darwins_maize_shows_has_a_power_of_80_percent() -> None:
    """The power of the paired t-test by the noncentral t distribution: at the smallest detectable difference it is 80 %."""
    found = stats.difference(DARWIN, np.zeros(15)).detectable
    away = found / (np.std(DARWIN, ddof=1) / np.sqrt(15))
    critical = reference.t.ppf(0.975, 14)
    power = reference.nct.sf(critical, 14, away) + reference.nct.cdf(-critical, 14, away)
    assert power == pytest.approx(0.8, abs=1e-3)
    assert found == pytest.approx(29.3, abs=0.2)


def test_rows_of_one_example_count_once_in_differences() -> None:
    rng = np.random.default_rng(7)
    a, b, examples = rng.random(20), rng.random(20), np.arange(20)
    often = [np.repeat(x, 6) for x in (a, b, examples)]
    assert stats.difference(*often).low == pytest.approx(stats.difference(a, b, examples).low)
    assert stats.difference(*often).p == pytest.approx(stats.difference(a, b, examples).p)
    assert stats.difference(*often).detectable == pytest.approx(stats.difference(a, b, examples).detectable)


def test_equal_scores_do_not_claim_certainty() -> None:
    found = stats.difference(np.ones(30), np.ones(30), bounds=(0, 1), resamples=20_000)
    assert found.value == 0
    # Clopper and Pearson's upper limit for 0 of 30: 1 - 0.025^(1/30).
    assert found.high == pytest.approx(reference.binomtest(0, 30).proportion_ci().high, abs=0.005)
    assert (found.low, found.p, found.detectable) == (pytest.approx(-found.high, abs=0.005), 1.0, found.high)


def test_what_is_kept_of_nothing_has_no_value() -> None:
    assert np.isnan(stats.kept([1, 1], [0, 0]).value)
    assert stats.kept([], []).n == 0


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


def difference(rng: np.random.Generator, n: int, seed: int) -> stats.Difference:
    return stats.difference(*_scores(rng, n), bounds=(0, 1), resamples=1000, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "truth", "estimate"),
    [
        (8, 0.2, lambda rng, i: difference(rng, 25, i)),
        (8, 0.2, lambda rng, i: difference(rng, 60, i)),
    ],
    ids=["difference of 25", "difference of 60"],
)
def test_a_95_percent_interval_covers_the_truth_95_times_of_100(seed: int, truth: float, estimate) -> None:
    rng = np.random.default_rng(seed)
    found = [estimate(rng, i) for i in range(2000)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.95


def test_of_two_settings_the_one_that_loses_more_in_every_answer_never_has_the_higher_bound() -> None:
    rng = np.random.default_rng(1)
    tasks = np.repeat(["one", "other"], [7, 9])
    for _ in range(200):
        full = rng.choice([0.0, 0.3, 1.0], 16, p=[0.2, 0.2, 0.6])
        full[0] = 1.0
        less = np.clip(full - rng.choice([-0.4, 0.0, 0.0, 0.2, 1.0], 16), 0, 1)
        more = np.clip(less - rng.choice([0.0, 0.0, 0.1, 1.0], 16), 0, 1)
        better, worse = stats.kept(less, full, None, tasks), stats.kept(more, full, None, tasks)
        assert worse.value <= better.value
        assert worse.low <= better.low
        assert worse.high <= better.high


def test_a_bound_of_answers_that_are_right_or_wrong_is_clopper_and_pearsons() -> None:
    score = np.r_[np.zeros(3), np.ones(57)]
    limit = reference.binomtest(3, 60).proportion_ci().high
    assert stats.kept(score, np.ones(60)).low == pytest.approx(1 - limit, abs=0.004)


def test_a_bound_of_what_is_kept_covers_the_truth() -> None:
    rng, held = np.random.default_rng(2), 0
    for seed in range(400):
        full = rng.beta(4, 1, 20)
        score = full * (1 - (rng.random(20) < 0.2) * rng.beta(1, 2, 20))
        held += stats.kept(score, full, resamples=1000, seed=seed).low <= 1 - 0.2 / 3
    assert held / 400 >= 0.95
