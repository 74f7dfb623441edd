"""Reverse water-filling against the closed form, the definition, and a solver that knows neither."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from testbed.stats.rate_distortion import gaussian_bits, water_level

variances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(np.array)


@given(st.floats(1e-3, 1e3), st.integers(1, 20), st.floats(1e-4, 1.0))
def test_of_equal_variances_it_is_half_a_bit_for_each_halving_of_the_error(
    variance: float, count: int, part: float
) -> None:
    assert gaussian_bits(np.full(count, variance), part * variance) == pytest.approx(
        -0.5 * math.log2(part), abs=1e-9
    )


@given(variances, st.floats(1e-6, 1.0))
def test_at_its_level_the_components_lose_what_was_asked(spread: np.ndarray, part: float) -> None:
    distortion = part * float(spread.mean())
    level = water_level(spread, distortion)
    assert np.minimum(level, spread).mean() == pytest.approx(distortion, rel=1e-9)


@pytest.mark.parametrize("distortion", [0.01, 0.2, 0.9, 3.0])
def test_no_allotment_of_errors_that_a_solver_finds_takes_fewer_bits(distortion: float) -> None:
    spread = np.array([8.0, 4.0, 1.0, 0.5, 0.1])
    least = optimize.minimize(
        lambda errors: 0.5 * np.log2(spread / errors).mean(),
        np.minimum(spread, distortion) * 0.9,
        bounds=[(1e-9, each) for each in spread],
        constraints={"type": "ineq", "fun": lambda errors: distortion - errors.mean()},
    )
    assert least.success
    assert gaussian_bits(spread, distortion) == pytest.approx(max(0.0, least.fun), abs=2e-4)


def test_as_large_an_error_as_the_variance_takes_nothing_and_none_takes_infinitely_many() -> None:
    spread = np.array([3.0, 1.0, 0.0])
    assert gaussian_bits(spread, float(spread.mean())) == 0
    assert gaussian_bits(spread, 10.0) == 0
    assert gaussian_bits(spread, 0.0) == math.inf
    assert gaussian_bits(np.zeros(4), 0.0) == 0
