"""The queue in front of a bottleneck: its size, in whichever unit, and who manages it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from testbed.errors import SpecError
from testbed.net.profile.bounds import LEAST_MTU, bounded
from testbed.units import exact, format_size, format_time, parse_size, parse_time

MIN_QUEUE_BYTES = 64_000
"""The least a queue in BDPs holds: a short link's product is a few packets, less than a real port has."""

_LIMITS = {"s": 60.0, "bytes": 1e9, "packets": 1e6, "bdp": 100.0}


@dataclass(frozen=True)
class CoDel:
    """Controlled delay, RFC 8289: what has waited longer than `target_s` for all of `interval_s` is dropped (or
    marked), ever more often until the wait is below it again. The queue's size remains its limit."""

    target_s: float = 0.005
    interval_s: float = 0.1

    def __post_init__(self) -> None:
        bounded("queue: CoDel's target", self.target_s, 1e-5, 10.0, format_time)
        bounded("queue: CoDel's interval", self.interval_s, 1e-4, 60.0, format_time)


@dataclass(frozen=True)
class Queue:
    """The bottleneck's buffer beyond the packets in flight. Raises SpecError outside of its bounds."""

    amount: float = 1.0
    unit: Literal["s", "bytes", "packets", "bdp"] = "bdp"
    codel: CoDel | None = None
    """None: drop-tail."""

    def __post_init__(self) -> None:
        least = {"s": 0.0, "bytes": float(LEAST_MTU), "packets": 1.0, "bdp": 0.0}
        if self.unit not in least:
            raise SpecError(f"queue: unknown unit {self.unit!r}")
        bounded("queue", self.amount, least[self.unit], _LIMITS[self.unit], self._show)

    def _show(self, amount: float) -> str:
        return _queue_text(amount, self.unit)

    def __str__(self) -> str:
        size = self._show(self.amount)
        if self.codel is None:
            return size
        target, interval = time_text(self.codel.target_s), time_text(self.codel.interval_s)
        return f"codel({size},target={target},interval={interval})"


def time_text(seconds: float) -> str:
    """A time, reading back as the same number."""
    return exact(seconds, format_time, parse_time, "s")


def _queue_text(amount: float, unit: str) -> str:
    if unit == "s":
        return time_text(amount)
    if unit == "bytes":
        return exact(amount, format_size, parse_size, "b")
    number = f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)
    return number + ("p" if unit == "packets" else "bdp")
