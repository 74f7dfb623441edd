"""A link's conditions: a queue, one direction, and a profile of two. `testbed.net.profile` reads them from
text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from testbed.errors import SpecError
from testbed.units import (
    format_fraction,
    format_rate,
    format_size,
    format_time,
    parse_fraction,
    parse_rate,
    parse_size,
    parse_time,
)

MTU = 1500
"""Bytes of the network layer in the largest packet: what a queue in packets is counted with."""
MIN_QUEUE_BYTES = 64_000
"""The least a queue in BDPs holds: a short link's product is a few packets, less than a real port has."""
INLINE_SOURCE = "given in place"

_LIMITS = {"s": 60.0, "bytes": 1e9, "packets": 1e6, "bdp": 100.0}


def _bounded(what: str, value: float, low: float, high: float, show: Callable[[float], str]) -> None:
    if not low <= value <= high:  # also false for NaN
        raise SpecError(f"{what} {show(value)} lies outside {show(low)}..{show(high)}")


@dataclass(frozen=True)
class Queue:
    """The bottleneck's buffer beyond the packets in flight. Raises SpecError outside of its bounds."""

    amount: float = 1.0
    unit: Literal["s", "bytes", "packets", "bdp"] = "bdp"

    def __post_init__(self) -> None:
        least = {"s": 0.0, "bytes": float(MTU), "packets": 1.0, "bdp": 0.0}
        if self.unit not in least:
            raise SpecError(f"queue: unknown unit {self.unit!r}")
        _bounded("queue", self.amount, least[self.unit], _LIMITS[self.unit], self._show)

    def _show(self, amount: float) -> str:
        return _queue_text(amount, self.unit)

    def __str__(self) -> str:
        return self._show(self.amount)


def _exact(value: float, pretty: Callable[[float], str], read: Callable[[str], float], unit: str) -> str:
    """`pretty`'s text where it reads back as the same number, every digit otherwise."""
    text = pretty(value)
    return text if read(text) == value else f"{value!r}{unit}"


def _queue_text(amount: float, unit: str) -> str:
    if unit == "s":
        return _exact(amount, format_time, parse_time, "s")
    if unit == "bytes":
        return _exact(amount, format_size, parse_size, "b")
    number = f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)
    return number + ("p" if unit == "packets" else "bdp")


@dataclass(frozen=True)
class Direction:
    """One way of a link. Raises SpecError where a value is out of bounds.

    A packet is lost with probability `loss`; else it travels for `delay_s` plus a normally distributed
    deviation of standard deviation `jitter_s` (never below zero in all), waits in the queue (or finds it full
    and is dropped), and is serialised at `rate_bps`. Packets keep their order: one that would overtake its
    predecessor arrives right behind it, as on a radio link with in-order delivery.
    """

    rate_bps: float | None = None
    """Bits per second of the network layer (IP header and up); None: as fast as the host."""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    queue: Queue = field(default_factory=Queue)

    def __post_init__(self) -> None:
        if self.rate_bps is not None:
            _bounded("rate", self.rate_bps, 1e3, 100e9, format_rate)
        _bounded("delay", self.delay_s, 0.0, 60.0, format_time)
        _bounded("loss", self.loss, 0.0, 1.0, format_fraction)
        if not 0 <= self.jitter_s <= self.delay_s:
            raise SpecError(
                f"jitter {format_time(self.jitter_s)} exceeds the delay {format_time(self.delay_s)}: "
                "packets would have to arrive before they were sent"
            )

    def __str__(self) -> str:
        parts = []
        if self.rate_bps is not None:
            parts.append("rate=" + _exact(self.rate_bps, format_rate, parse_rate, "bit"))
        parts.append("delay=" + _exact(self.delay_s, format_time, parse_time, "s"))
        if self.jitter_s:
            parts.append("jitter=" + _exact(self.jitter_s, format_time, parse_time, "s"))
        if self.loss:
            parts.append("loss=" + _exact(self.loss, format_fraction, parse_fraction, ""))
        if self.queue != Queue():
            parts.append(f"queue={self.queue}")
        return ",".join(parts)

    def queue_bytes(self, round_trip_s: float) -> int | None:
        """Bytes the queue holds, at least one packet; `round_trip_s` is the sum of both ways' delays.

        None where that has no meaning: nothing waits for an unlimited rate, so its time and BDPs are no size.
        """
        if self.queue.unit == "bytes":
            return max(MTU, round(self.queue.amount))
        if self.queue.unit == "packets":
            return max(1, round(self.queue.amount)) * MTU
        if self.rate_bps is None:
            return None
        if self.queue.unit == "s":
            return max(MTU, round(self.queue.amount * self.rate_bps / 8))
        return max(MIN_QUEUE_BYTES, round(self.queue.amount * self.rate_bps / 8 * round_trip_s))


@dataclass(frozen=True)
class Profile:
    """The conditions of one link, each way.

    `name` is a preset's name or the canonical form of the text the profile was read from, so `str` reads
    back; `source` says where the numbers come from.
    """

    name: str
    up: Direction
    down: Direction
    source: str = INLINE_SOURCE

    def __str__(self) -> str:
        return self.name

    def text(self) -> str:
        """The numbers themselves, a preset's too."""
        return str(self.up) if self.up == self.down else f"up:{self.up};down:{self.down}"

    @property
    def round_trip_s(self) -> float:
        """Both ways' one-way delays, seconds."""
        return self.up.delay_s + self.down.delay_s

    def queue_bytes(self, way: Literal["up", "down"]) -> int | None:
        """See `Direction.queue_bytes`."""
        return (self.up if way == "up" else self.down).queue_bytes(self.round_trip_s)

    def bdp_bytes(self) -> float:
        """Bandwidth-delay product of the faster way, bytes; 0 where the rate is not limited."""
        return max(self.up.rate_bps or 0.0, self.down.rate_bps or 0.0) / 8 * self.round_trip_s
