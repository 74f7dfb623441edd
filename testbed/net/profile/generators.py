"""Links that change by a rule: steps, a sine, an outage, a link that flaps.

Each is a frozen description that prints as profile text and gives its samples over time. Steps and the sine give the rate; an
outage and a flapping link stop whatever rate the profile has.
"""

from __future__ import annotations

from array import array
from math import inf, pi, sin
from typing import ClassVar

import msgspec

from testbed.errors import SpecError, UnitError
from testbed.net.profile.recordings.recording import MAX_SECONDS, Samples
from testbed.units import exact_rate, exact_time, format_rate, format_time, parse_rate, parse_time

_FINEST_S = 0.01  # of the steps a sine is made of
_MOST_STEPS = 4000
_MAX_RATE_BPS = 100e9
_SHORTEST_S = 1e-3


def _rate(text: str) -> float:
    try:
        rate = parse_rate(text.strip())
    except UnitError as error:
        raise SpecError(str(error)) from None
    if rate > _MAX_RATE_BPS:
        raise SpecError(f"rate {text.strip()[:40]} is more than {format_rate(_MAX_RATE_BPS)}")
    return rate


def _time(text: str, what: str, low: float = _SHORTEST_S) -> float:
    try:
        seconds = parse_time(text.strip())
    except UnitError as error:
        raise SpecError(str(error)) from None
    if not low <= seconds <= MAX_SECONDS:
        raise SpecError(
            f"{what} {text.strip()[:40]} lies outside {format_time(low)}..{MAX_SECONDS / 86400:g} days"
        )
    return seconds


def _halves(text: str, mark: str, example: str) -> tuple[str, str]:
    left, separator, right = text.partition(mark)
    if not separator:
        raise SpecError(f"{text.strip()[:40]!r}: write it as {example}")
    return left, right


class Step(msgspec.Struct, frozen=True, tag="step"):
    """``step:50mbit*10s+5mbit*5s``: one rate after the other, each for its time."""

    parts: tuple[tuple[float, float], ...]  # (bits per second, seconds)
    kind: ClassVar[str] = "step"

    @classmethod
    def parse(cls, text: str) -> Step:
        parts = []
        for part in text.split("+"):
            rate, seconds = _halves(part, "*", "step:50mbit*10s+5mbit*5s")
            parts.append((_rate(rate), _time(seconds, "a step's time")))
        return cls(tuple(parts))

    def __str__(self) -> str:
        return "step:" + "+".join(f"{exact_rate(rate)}*{exact_time(seconds)}" for rate, seconds in self.parts)

    def samples(self, rate_bps: float | None) -> Samples:
        times, now = array("d"), 0.0
        for _, seconds in self.parts:
            times.append(now)
            now += seconds
        return Samples(times, now, array("f", [rate / 8 for rate, _ in self.parts]))


class Sine(msgspec.Struct, frozen=True, tag="sine"):
    """``sine:10mbit..50mbit*20s``: from the middle up, down and back in 20 s, in steps of 10 ms (longer ones above 40 s)."""

    low_bps: float
    high_bps: float
    period_s: float
    kind: ClassVar[str] = "sine"

    @classmethod
    def parse(cls, text: str) -> Sine:
        example = "sine:10mbit..50mbit*20s"
        rates, period = _halves(text, "*", example)
        low, high = _halves(rates, "..", example)
        sine = cls(_rate(low), _rate(high), _time(period, "a sine's period", 4 * _FINEST_S))
        if sine.low_bps > sine.high_bps:
            raise SpecError(f"sine: {low.strip()} is more than {high.strip()}; the lower rate comes first")
        return sine

    def __str__(self) -> str:
        return f"sine:{exact_rate(self.low_bps)}..{exact_rate(self.high_bps)}*{exact_time(self.period_s)}"

    def samples(self, rate_bps: float | None) -> Samples:
        steps = min(_MOST_STEPS, round(self.period_s / _FINEST_S))
        middle, swing = (self.low_bps + self.high_bps) / 2, (self.high_bps - self.low_bps) / 2
        rates = [(middle + swing * sin(2 * pi * (i + 0.5) / steps)) / 8 for i in range(steps)]
        times = array("d", [i * self.period_s / steps for i in range(steps)])
        return Samples(times, self.period_s, array("f", [max(0.0, rate) for rate in rates]))


class Outage(msgspec.Struct, frozen=True, tag="outage"):
    """``outage:5s@10s``: nothing is sent for 5 s, 10 s from the beginning; what waits waits. Once, or with ``every=60s`` again
    and again."""

    seconds: float
    at_s: float = 0.0
    every_s: float | None = None
    kind: ClassVar[str] = "outage"

    @classmethod
    def parse(cls, text: str) -> Outage:
        rest, _, every = text.partition("/")
        seconds, _, at = rest.partition("@")
        outage = cls(
            _time(seconds, "an outage"),
            _time(at, "an outage's beginning", 0.0) if at.strip() else 0.0,
            _time(every, "the time from one outage to the next") if every.strip() else None,
        )
        if outage.every_s is not None and outage.at_s + outage.seconds >= outage.every_s:
            raise SpecError("outage: it would not be over when the next one begins")
        return outage

    def __str__(self) -> str:
        at = f"@{exact_time(self.at_s)}" if self.at_s else ""
        return f"outage:{exact_time(self.seconds)}{at}" + (
            f"/{exact_time(self.every_s)}" if self.every_s else ""
        )

    def samples(self, rate_bps: float | None) -> Samples:
        end = self.at_s + self.seconds
        length = self.every_s if self.every_s is not None else end + _SHORTEST_S
        up = inf if rate_bps is None else rate_bps / 8
        parts = [(0.0, up), (self.at_s, 0.0), (end, up)] if self.at_s else [(0.0, 0.0), (end, up)]
        return Samples(array("d", [at for at, _ in parts]), length, array("f", [rate for _, rate in parts]))


class Flap(msgspec.Struct, frozen=True, tag="flap"):
    """``flap:10s/1s``: up for 10 s, down for 1 s, up again, and so on."""

    up_s: float
    down_s: float
    kind: ClassVar[str] = "flap"

    @classmethod
    def parse(cls, text: str) -> Flap:
        up, down = _halves(text, "/", "flap:10s/1s, the time it is up and the time it is down")
        return cls(_time(up, "the time it is up"), _time(down, "the time it is down"))

    def __str__(self) -> str:
        return f"flap:{exact_time(self.up_s)}/{exact_time(self.down_s)}"

    def samples(self, rate_bps: float | None) -> Samples:
        up = inf if rate_bps is None else rate_bps / 8
        return Samples(array("d", [0.0, self.up_s]), self.up_s + self.down_s, array("f", [up, 0.0]))
