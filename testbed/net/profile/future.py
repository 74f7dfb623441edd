"""What a link's rate will be, for who may know it."""

from __future__ import annotations

from math import inf, nextafter

from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.profile import Profile
from testbed.net.profile.trace import Way

#: Opportunities to send, which have no rate, are counted over so long.
_BIN_S = 0.02


def future(
    profile: Profile, way: Way, since_s: float = 0.0, length_s: float = 120.0
) -> list[tuple[float, float]]:
    """The rate over time of one way: (seconds, bits per second), from each step on; inf: not limited, 0: an outage.

    The first step is at 0, which is *since_s* after the profile's trace began; what holds at *length_s*, holds for ever. Raises
    SpecError where the trace's file is missing or wrong.
    """
    direction = profile.ways[way]
    schedule = direction.schedule(way, 0.0)
    steps: list[tuple[float, float]] = []
    if schedule is None or not schedule.gives_rate:
        return [(0.0, inf if direction.rate_bps is None else direction.rate_bps)]
    now = since_s
    while now <= since_s + length_s:
        if isinstance(schedule, Deliveries):
            following = now + _BIN_S
            rate = schedule.capacity(now, following) / _BIN_S
        else:
            following = schedule.next_change(now)
            rate = schedule.rate_at(now) or 0.0
        if not steps or steps[-1][1] != rate * 8:
            steps.append((now - since_s, rate * 8))
        now = max(following, nextafter(now, inf))  # by rounding, a change may come again
    return steps
