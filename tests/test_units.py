"""People's units in, plain numbers out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed import units
from testbed.errors import UnitError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_rate, "50mbit", 50e6),
        (units.parse_rate, "1.5 Gbit", 1.5e9),
        (units.parse_time, "20ms", 0.02),
        (units.parse_time, "250us", 250e-6),
        (units.parse_time, "0", 0.0),
        (units.parse_size, "512kb", 512_000),
        (units.parse_size, "1kib", 1024),
        (units.parse_fraction, "1%", 0.01),
        (units.parse_fraction, 0.25, 0.25),
        (units.parse_percentage, "1%", 0.01),
        (units.parse_percentage, "0", 0.0),
        (units.parse_percentage, 0, 0.0),
        (units.parse_time, 0, 0.0),
        (units.parse_size, 0.0, 0),
    ],
)
def test_quantities_are_read(parse, text, value) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (units.parse_rate, "50"),
        (units.parse_rate, "50mb/s"),
        (units.parse_rate, "-1mbit"),
        (units.parse_rate, "nan"),
        (units.parse_rate, True),
        (units.parse_rate, 1000),
        (units.parse_time, 20),
        (units.parse_time, "20"),
        (units.parse_time, 0.5),
        (units.parse_size, 1500),
        (units.parse_percentage, 1),
        (units.parse_percentage, "1"),
        (units.parse_percentage, 0.01),
        (units.parse_percentage, "0.01"),
        (units.parse_percentage, "101%"),
        (units.parse_percentage, "1ms"),
        (units.parse_time, "20parsec"),
        (units.parse_time, ""),
        (units.parse_size, "1e400b"),
        (units.parse_fraction, "101%"),
        (units.parse_fraction, "1ms"),
    ],
)
def test_what_is_no_quantity_is_refused_with_its_value(parse, text) -> None:
    with pytest.raises(UnitError, match=str(text)[:5] or "''"):
        parse(text)


@given(st.floats(1, 1e11))
def test_rates_read_back_as_printed(rate: float) -> None:
    assert units.parse_rate(units.format_rate(rate)) == pytest.approx(rate, rel=1e-3)


@given(st.floats(1e-8, 1e4))
def test_times_read_back_as_printed(seconds: float) -> None:
    assert units.parse_time(units.format_time(seconds)) == pytest.approx(seconds, rel=1e-3)


@given(st.floats(0, 1))
def test_a_fraction_printed_exactly_is_the_same_number(fraction: float) -> None:
    if fraction == 0 or fraction > 1e-12:
        assert units.parse_percentage(units.exact_percentage(fraction)) == fraction


@given(st.floats(0, 1e15))
def test_a_time_printed_exactly_is_the_same_number_and_has_no_plus(seconds: float) -> None:
    text = units.exact(seconds, units.format_time, units.parse_time, "s")
    assert units.parse_time(text) == seconds
    assert "+" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12_500.0, "12500s"),
        (604_800.0, "604800s"),
        (12_345.678, "12345.678s"),
        (1e17, "100000000000000000s"),
        (1e-12, "0.000000000001s"),
        (1.2345678e-12, "0.0000000000012345678s"),
    ],
)
def test_large_and_tiny_times_are_printed_without_an_exponent(seconds: float, text: str) -> None:
    assert units.exact(seconds, units.format_time, units.parse_time, "s") == text


@given(st.text(max_size=80))
def test_any_text_is_a_quantity_or_a_typed_error(text: str) -> None:
    for parse in (
        units.parse_rate,
        units.parse_time,
        units.parse_size,
        units.parse_fraction,
        units.parse_percentage,
    ):
        try:
            assert parse(text) >= 0
        except UnitError:
            pass
