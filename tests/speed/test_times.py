"""A device's times between and beyond the measured points, against the laws that passes and tokens follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.speed.times import BEYOND, DeviceTimes

MEASURED = (16, 32, 64, 128, 256, 512, 1024)
PARTS = st.floats(1e-6, 1e-3)


def device(weights: float, each: float, attention: float, reading: float) -> tuple[DeviceTimes, object]:
    """A device whose pass takes `weights` + `each` a token + `attention` a pair, and that law."""

    def law(tokens: int) -> float:
        return weights + each * tokens + attention * tokens**2

    prefill = tuple((n, law(n)) for n in MEASURED)
    decode = tuple((n, weights + reading * n) for n in MEASURED)
    return DeviceTimes("d", "m", prefill, decode), law


@given(PARTS, PARTS, st.floats(0, 1e-6), st.integers(16, 1024))
def test_a_pass_lies_at_most_an_eighth_above_what_weights_tokens_and_attention_take(
    weights: float, each: float, attention: float, tokens: int
) -> None:
    times, law = device(weights, each, attention, 0.0)
    true = law(tokens)  # type: ignore[operator]
    assert true * (1 - 1e-9) <= times.pass_s(tokens) <= true * 1.125 * (1 + 1e-9)


@given(PARTS, st.floats(0, 1e-6), st.integers(16, BEYOND * 1024))
def test_a_token_takes_what_reading_weights_and_context_takes(
    weights: float, reading: float, past: int
) -> None:
    times, _ = device(weights, 1e-5, 0.0, reading)
    assert times.token_s(past) == pytest.approx(weights + reading * past)


@given(PARTS, PARTS, st.floats(0, 1e-6), st.integers(1, 512), st.integers(1, 512))
def test_behind_others_a_pass_takes_no_less_than_alone_or_than_a_token_or_than_both_passes_differ(
    weights: float, each: float, attention: float, tokens: int, past: int
) -> None:
    times, _ = device(weights, each, attention, 1e-7)
    took = times.pass_s(tokens, past)
    assert took >= times.pass_s(tokens)
    assert took >= times.token_s(past)
    assert took >= times.pass_s(tokens + past) - times.pass_s(past)


def test_one_published_point_serves_passes_up_to_twice_as_long() -> None:
    times = DeviceTimes("d", "m", ((170, 0.025),), ((170, 0.020),))
    assert times.pass_s(1) == pytest.approx(0.020)
    assert times.pass_s(170) == pytest.approx(0.025)
    assert 0.025 < times.pass_s(340) < 0.050
    assert times.token_s(3) == times.token_s(170) == times.token_s(340) == 0.020
    assert times.pass_s(0) == 0.0


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda t: t.pass_s(2049), "device d: prefill was measured up to 1024 tokens, and 2049 are more than 2"),
        (lambda t: t.pass_s(1000, 1049), "prefill was measured up to 1024 tokens, and 2049 are more"),
        (lambda t: t.token_s(2049), "device d: decode was measured up to 1024 tokens, and 2049 are more"),
        (lambda t: DeviceTimes("e", "m", t.prefill).token_s(5), "device e: has no times of decoding"),
        (lambda t: DeviceTimes("e", "m", t.prefill).pass_s(7), "in passes of 16 tokens and more; 7 are too few"),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_refused_by_the_devices_name(ask, complaint) -> None:  # type: ignore[no-untyped-def]
    times, _ = device(1e-3, 1e-4, 0.0, 1e-7)
    with pytest.raises(SpecError, match=complaint):
        ask(times)
