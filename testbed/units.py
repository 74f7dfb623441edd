"""Reading and printing quantities: the one place that knows people's units.

Inside the program everything is seconds, bytes, bits per second and fractions, as plain numbers. People may write
``50mbit``, ``20ms``, ``1%``, ``512kb``. Suffixes follow ``tc(8)``: rates in bits (``kbit``, ``mbit``, ``gbit``, decimal) or
bytes (``kbps``, ``mbps`` -- tc's own surprise); we refuse the byte forms of rates, which are mistaken for bits too often.
A number without its unit is refused, but for 0: tools do not agree on which it would be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal

from testbed.errors import UnitError

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIMES = {
    "s": 1.0,
    "sec": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "µs": 1e-6,
    "ns": 1e-9,
    "min": 60.0,
    "m": 60.0,
    "h": 3600.0,
}
_SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LONGEST = 64  # characters of a quantity
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ%]*)\s*$")


def _split(text: str | float, what: str, example: str) -> tuple[float, str]:
    if isinstance(text, bool):
        raise UnitError(f"{what} {text!r}: expected a number with a unit, such as {example}")
    match = _NUMBER.match(str(text)) if len(str(text)) <= _LONGEST else None
    if match is None or not math.isfinite(float(match[1])):
        raise UnitError(f"{what} {str(text)[:40]!r}: expected a number with a unit, such as {example}")
    return float(match[1]), match[2].lower()


def _scaled(text: str | float, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    number, unit = _split(text, what, example)
    if unit == "" and number != 0:
        raise UnitError(f"{what} {text!r} has no unit; write it with one, as {example}")
    if unit not in units and unit != "":
        raise UnitError(
            f"{what} {text!r}: unknown unit {unit!r}; use one of {', '.join(units)} (such as {example})"
        )
    if number < 0:
        raise UnitError(f"{what} {text!r} is negative")
    value = number * (units[unit] if unit else 1)
    if not math.isfinite(value):
        raise UnitError(f"{what} {text!r} is too large")
    return value


def parse_rate(text: str | float) -> float:
    """``"50mbit"`` -> 50e6 bits per second. Raises UnitError."""
    return _scaled(text, _RATES, "rate", "50mbit")


def parse_time(text: str | float) -> float:
    """``"20ms"`` -> 0.02 seconds. Raises UnitError."""
    return _scaled(text, _TIMES, "time", "20ms")


def parse_size(text: str | float) -> int:
    """``"512kb"`` -> 512000 bytes (``kib`` is 1024). Raises UnitError."""
    return round(_scaled(text, _SIZES, "size", "512kb"))


def parse_per_second(text: str | float) -> float:
    """``"2/s"`` -> 2.0, ``"90/min"`` -> 1.5: so many a second. Raises UnitError."""
    number, slash, unit = str(text).partition("/")
    scale = {"s": 1.0, "min": 60.0, "h": 3600.0}.get(unit.strip().lower())
    if not slash or scale is None:
        raise UnitError(
            f"rate {str(text)[:40]!r}: write how many there are in which time, such as 2/s or 90/min"
        )
    value, rest = _split(number, "rate", "2/s")
    if rest or value < 0:
        raise UnitError(f"rate {str(text)[:40]!r}: expected a number a second, such as 2/s")
    return value / scale


def exact_per_second(per_second: float) -> str:
    """2.0 -> ``"2/s"``; reads back as the same number."""
    return positional(repr(int(per_second) if per_second == int(per_second) else per_second)) + "/s"


def exact_size(size_bytes: int) -> str:
    """As `format_size`, but every digit where four are not enough."""
    text = format_size(size_bytes)
    return text if parse_size(text) == size_bytes else f"{size_bytes}b"


def parse_fraction(text: str | float) -> float:
    """``"1%"`` or ``0.01`` -> 0.01: a ratio, which nobody takes for percent. Must lie in 0..1. Raises UnitError."""
    return _fraction(text, "fraction", "1% or 0.01", bare=True)


def parse_percentage(text: str | float) -> float:
    """``"1%"`` -> 0.01. Must lie in 0..1. Raises UnitError, also for a number without the sign: ``loss 1`` is 1 % to tc(8)."""
    return _fraction(text, "percentage", "1%", bare=False)


def _fraction(text: str | float, what: str, example: str, bare: bool) -> float:
    number, unit = _split(text, what, example)
    if unit not in ("", "%"):
        raise UnitError(f"{what} {text!r}: unknown unit {unit!r}; write {example}")
    if unit == "" and number != 0 and not bare:
        raise UnitError(f"{what} {text!r} has no unit; write it with one, as {example}")
    # In decimals, so that what was printed exactly is read exactly.
    value = float(Decimal(str(text).strip().rstrip("% ")) / 100) if unit == "%" else number
    if not 0 <= value <= 1:
        raise UnitError(f"{what} {text!r} lies outside 0..1 (0%..100%)")
    return value


def _print(value: float, units: list[tuple[float, str]]) -> str:
    for scale, unit in units:
        if value >= scale:
            return positional(f"{value / scale:.4g}") + unit
    scale, unit = units[-1]
    return positional(f"{value / scale:.4g}") + unit


def positional(number: str) -> str:
    """The same digits without an exponent, whose ``+`` separates the steps of a trace; of a number so small that
    it would be too long to be read, the text as it is (its exponent has a ``-``)."""
    if "e" not in number:
        return number
    text = f"{Decimal(number):f}"
    return text if len(text) < _LONGEST - 4 else number


def exact(value: float, pretty: Callable[[float], str], read: Callable[[str], float], unit: str) -> str:
    """*pretty*'s text where it reads back as the same number, every digit and *unit* otherwise."""
    text = pretty(value)
    return text if read(text) == value else positional(repr(value)) + unit


def exact_rate(rate_bps: float) -> str:
    """As `format_rate`, but every digit where four are not enough."""
    return exact(rate_bps, format_rate, parse_rate, "bit")


def exact_time(seconds: float) -> str:
    """As `format_time`, but every digit where four are not enough."""
    return exact(seconds, format_time, parse_time, "s")


def format_rate(rate_bps: float) -> str:
    """50e6 -> ``"50mbit"``; reads back with `parse_rate` to four digits."""
    return _print(rate_bps, [(1e9, "gbit"), (1e6, "mbit"), (1e3, "kbit"), (1.0, "bit")])


def format_time(seconds: float) -> str:
    """0.02 -> ``"20ms"``; reads back with `parse_time` to four digits."""
    if seconds == 0:
        return "0ms"
    return _print(seconds, [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])


def format_size(size_bytes: float) -> str:
    """1536000 -> ``"1.536mb"``; reads back with `parse_size` to four digits."""
    return _print(size_bytes, [(1e9, "gb"), (1e6, "mb"), (1e3, "kb"), (1.0, "b")])


def format_fraction(fraction: float) -> str:
    """0.01 -> ``"1%"``."""
    return f"{fraction * 100:.4g}%"


def exact_percentage(fraction: float) -> str:
    """As `format_fraction`, but every digit where four are not enough."""
    text = format_fraction(fraction)
    return (
        text if parse_percentage(text) == fraction else positional(str(Decimal(repr(fraction)) * 100)) + "%"
    )


def format_duration(seconds: float) -> str:
    """A length of time for people: ``"3 min 20 s"``. Not meant to be read back."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
