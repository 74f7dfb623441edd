"""The rate at which a bottleneck sends: when will these bytes have been sent?"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from testbed.net.emulators.relay.conditions import Conditions

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.schedule import Schedule


class Rate:
    """Always the same. With every packet come *overhead* bytes of lower layers."""

    pauses = False
    """Whether it may be nothing for a while."""

    def __init__(self, rate_bps: float | None, overhead: int) -> None:
        self.seconds_per_byte, self.overhead = 8 / (rate_bps or inf), overhead

    def finish(self, begins: float, size: float, count: int) -> float:
        """When *count* packets of together *size* bytes have been sent that begin then."""
        return begins + (size + count * self.overhead) * self.seconds_per_byte

    def unsent(self, size: float, begins: float, ends: float, now: float) -> float:
        """How many of *size* bytes, overhead included, are left at *now* of what is sent from *begins* to *ends*."""
        return size * max(0.0, (ends - now) / (ends - begins)) if ends > begins else 0.0

    def holds(self, time_s: float) -> tuple[float, float]:
        """Bytes a second at that time, and until when."""
        return 1 / self.seconds_per_byte if self.seconds_per_byte else inf, inf

    def capacity(self, begin_s: float, end_s: float) -> float:
        """Bytes that can be sent between two times."""
        return (end_s - begin_s) * self.holds(begin_s)[0]

    def same(self, other: Rate) -> bool:
        """Whether the other one sends at all times as fast."""
        return type(self) is type(other) and vars(self) == vars(other)


class TracedRate(Rate):
    """A trace's: a rate over time, or opportunities to deliver."""

    pauses = True

    def __init__(self, schedule: Schedule | Deliveries, overhead: int) -> None:
        self.schedule, self.overhead = schedule, overhead

    def finish(self, begins: float, size: float, count: int) -> float:
        return self.schedule.finish(begins, size + count * self.overhead)

    def unsent(self, size: float, begins: float, ends: float, now: float) -> float:
        return max(0.0, size - self.schedule.capacity(begins, now))

    def holds(self, time_s: float) -> tuple[float, float]:
        return self.schedule.holds(time_s)

    def capacity(self, begin_s: float, end_s: float) -> float:
        return self.schedule.capacity(begin_s, end_s)


def rate_of(conditions: Conditions) -> Rate:
    """What a direction's conditions ask for."""
    schedule, overhead = conditions.schedule, conditions.overhead_bytes
    if schedule is not None and schedule.gives_rate:
        return TracedRate(schedule, overhead)
    return Rate(conditions.rate_bps, overhead)
