"""How a token bucket follows a trace: at each step, the rate that brings it to where the trace will be at the next one.

A change fills the bucket: it gives away a packet's worth each time, and what was saved for the packet at the head of the queue
is forgotten. So the bytes that left are counted, and a step asks for what the trace has had for them since the beginning, no
more and no less: errors do not add up. What a link could have carried while nothing waited is gone, as it is on any link.

Standard library alone: the process that follows traces loads this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from testbed.net.emulators.netem.shaping import ETHERNET_HEADER, SLACK_S

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.schedule import Schedule

MOST_BYTES_PER_S = 10**11  # "no limit"
_LEAST_BYTES_PER_S = 125  # a kilobit per second: what the bucket gives beyond its one filling does not count
_MEMORY_STEPS = 12  # at most so much of what a bottleneck is behind with is made up for


@dataclass(frozen=True)
class Pace:
    """What a bottleneck does until the next step: hold everything, or a bucket of so many bytes at this rate."""

    hold: bool
    rate_bytes_per_s: int
    burst_bytes: int


class Pacer:
    """One direction's. Times in seconds, on the schedule's clock; bytes as the bottleneck counts them."""

    def __init__(self, schedule: Schedule | Deliveries, mtu: int, now: float, delivered: int) -> None:
        self._schedule, self._mtu = schedule, mtu
        self._now, self._delivered = now, delivered
        self._behind = (
            0.0  # bytes that the trace had for what waited, and that did not leave; below 0: sent ahead
        )
        self._idle = True

    def step(self, now: float, until: float, delivered: int, waiting: int) -> Pace:
        """The pace from *now* to *until*. *delivered*: bytes that have left, ever; *waiting*: bytes in the queue."""
        had = self._schedule.capacity(self._now, now)
        coming = self._schedule.capacity(now, until)
        self._behind += had - (delivered - self._delivered)
        self._behind = min(self._behind, self._allowed(had, coming, waiting))
        self._now, self._delivered, self._idle = now, delivered, waiting == 0
        if coming == 0:
            return Pace(True, _LEAST_BYTES_PER_S, self._mtu + ETHERNET_HEADER)
        if coming == inf:
            return Pace(False, MOST_BYTES_PER_S, 1 << 20)
        burst = self._mtu + ETHERNET_HEADER + round(coming / (until - now) * SLACK_S)
        wanted = self._behind + coming
        rate = round((wanted - (burst if waiting else 0)) / (until - now))
        rate = min(MOST_BYTES_PER_S, max(_LEAST_BYTES_PER_S, rate))
        return Pace(self._holds(wanted, coming, waiting), rate, burst)

    def _allowed(self, had: float, coming: float, waiting: int) -> float:
        """How far behind one may be: not at all where nothing waited, by no more than a packet where it has just begun to."""
        if inf in (had, coming) or waiting == 0:
            return 0.0
        if self._idle:
            return float(self._mtu)
        return max(2.0 * self._mtu, _MEMORY_STEPS * max(had, coming), self._behind if coming == 0 else 0.0)

    def _holds(self, wanted: float, coming: float, waiting: int) -> bool:
        """Whether nothing may leave in this step. Where a packet takes many steps it has to wait for its own time, too; else one
        that finds the bottleneck idle may leave at once, and what follows waits for it."""
        if waiting:
            return wanted < min(self._mtu, waiting)
        return wanted <= 0 or coming * 4 < self._mtu
