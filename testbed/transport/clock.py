"""Two machines' clocks: by how much one is ahead of the other while a request crosses between them, and how far that may be off.

A set of exchanges before a request, and one behind it (RFC 5905, section 8, of whose samples the one with the shortest round trip
is taken, as by Paxson, On Calibrating Measurements of Packet Transit Times, SIGMETRICS 1998). Whatever part of a round trip each
way takes, the offset is off by half of it at most. Between the two sets the clocks are taken to drift evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

#: By which a clock's rate may change while a request is under way, of 1: a quartz in a room.
_WANDER = 1e-6
#: By which two clocks' rates may be apart, of 1.
DRIFT = 200e-6


@dataclass(frozen=True)
class Offset:
    """At the moment `at` of this side's clock the other's was `ahead_s` ahead, give or take `error_s`."""

    at: float
    ahead_s: float
    error_s: float


def offset(exchanges: list[tuple[float, float, float, float]]) -> Offset:
    """From when each was sent here, received and answered there, and received here: the one with the shortest round trip."""

    def trip(exchange: tuple[float, float, float, float]) -> float:
        sent, received, answered, back = exchange
        return (back - sent) - (answered - received)

    sent, received, answered, back = best = min(exchanges, key=trip)
    ahead = ((received - sent) + (answered - back)) / 2
    there = answered - received
    return Offset((sent + back) / 2, ahead, max(0.0, trip(best)) / 2 + DRIFT * max(0.0, there))


@dataclass(frozen=True)
class Clock:
    """The other side's, as this side's sees it between two sets of exchanges, or behind the first."""

    before: Offset
    behind: Offset | None = None

    def here(self, there: float) -> float:
        """When that was by this side's clock."""
        at = there - self.before.ahead_s
        if self.behind is None:
            return at
        apart = self.behind.at - self.before.at
        share = (at - self.before.at) / apart if apart > 0 else 0.0
        return there - self.before.ahead_s - share * (self.behind.ahead_s - self.before.ahead_s)

    @property
    def ahead_s(self) -> float:
        """By how much it is ahead, in the middle."""
        return self.before.ahead_s if self.behind is None else (self.before.ahead_s + self.behind.ahead_s) / 2

    @property
    def error_s(self) -> float:
        """How far a time between the two sets may be off, by this side's clock."""
        if self.behind is None:
            return self.before.error_s
        apart = max(0.0, self.behind.at - self.before.at)
        return max(self.before.error_s, self.behind.error_s) + _WANDER * apart

    @property
    def jumped_s(self) -> float:
        """By how much more it changed between the two sets than clocks drift: it was set, or stood still; 0: it did not."""
        if self.behind is None:
            return 0.0
        changed = self.behind.ahead_s - self.before.ahead_s
        drift = DRIFT * abs(self.behind.at - self.before.at)
        return changed if abs(changed) > self.before.error_s + self.behind.error_s + drift else 0.0
