"""Does a link follow its trace? A flow that saturates it over a stretch of the trace, and what arrived in every tenth of a second
beside what the trace has for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt

from testbed.net.calibration.checks import Check
from testbed.net.calibration.probes import WAYS, Arrived, Flow, Prober
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.profile import Profile
from testbed.net.profile.schedule import Schedule
from testbed.units import format_fraction

BIN_S = 0.1
STRETCH_S = 8.0
_TOLERANCES = {"userspace": (0.99, 0.02), "netem": (0.98, 0.03)}  # correlation, total
_LEAD_S = 1.0  # the flow is there before the stretch begins: the queue stands when it does
_READY_S = 0.7  # so much of that has to be left when the link is under the trace, to tell the senders
_TRIES = 3
_STEP_S = 0.02  # how often the flow's rate changes
_MARGIN_S = 0.08  # it is as fast as the trace is anywhere within this time before or after
_OVERLOAD = 1.15
_LEAST_BPS = 200e3
_PARALLEL_BPS = (
    60e6  # both ways at once only where their rates sum up to less: the processor must not be the limit
)
_FULL_PACKET, _SMALL_PACKET = 1500, 200


@dataclass(frozen=True)
class Curve:
    """Bytes of the network layer in equal parts of one stretch of the trace, as asked and as delivered."""

    way: str
    begin_s: float  # in the trace, after its offset
    bin_s: float
    asked_bytes: tuple[float, ...]
    delivered_bytes: tuple[int, ...]

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where the trace is as good as constant: what is left then is the packets' grain."""
        n = len(self.asked_bytes)
        means = sum(self.asked_bytes) / n, sum(self.delivered_bytes) / n
        pairs = [
            (a - means[0], d - means[1]) for a, d in zip(self.asked_bytes, self.delivered_bytes, strict=True)
        ]
        asked, delivered = sum(a * a for a, _ in pairs), sum(d * d for _, d in pairs)
        if sqrt(asked / n) < 0.02 * means[0]:
            return None
        return sum(a * d for a, d in pairs) / sqrt(asked * delivered) if delivered else 0.0

    @property
    def totals(self) -> tuple[float, int]:
        """Bytes asked and delivered over the whole stretch."""
        return sum(self.asked_bytes), sum(self.delivered_bytes)

    def checks(self, emulator: str) -> list[Check]:
        """The verdict for shape and sum."""
        least, most_off = _TOLERANCES.get(emulator, _TOLERANCES["userspace"])
        asked, delivered = self.totals
        n, shape = len(self.asked_bytes), self.correlation
        fits = None if shape is None else shape >= least
        total_ok = abs(delivered - asked) <= most_off * asked
        return [
            Check(self.way, "curve", 1.0, shape, None, None, n, fits, f"≥ {least}"),
            Check(
                self.way, "total", asked, delivered, None, None, n, total_ok, f"±{format_fraction(most_off)}"
            ),
        ]


def follow(
    prober: Prober, profile: Profile, apply: Callable[[float], object], seconds: float = STRETCH_S
) -> list[Curve]:
    """A curve for each way whose rate changes between limits. *apply* puts the link under the profile, its traces beginning at
    the time given. Raises NetworkError when probing fails."""
    ways = [way for way in WAYS if beginning(_schedule(profile, way, 0.0), seconds) is not None]
    steady = profile.steady()
    if sum(getattr(steady, way).rate_bps for way in ways) <= _PARALLEL_BPS:
        groups = [ways] if ways else []
    else:
        groups = [[way] for way in ways]
    curves = []
    for group in groups:
        # One origin for both: they begin where the first of them has something to send.
        begin = min(beginning(_schedule(profile, way, 0.0), seconds) or 0.0 for way in group)
        start = _applied(apply, begin)
        made = {way: _schedule(profile, way, start - begin) for way in group}
        sizes = {way: _packet_bytes(made[way], getattr(steady, way).rate_bps) for way in group}
        flows = {
            way: _flow(profile, way, made[way], sizes[way], time.monotonic(), start + seconds)
            for way in group
        }
        arrived = prober.run(flows, max(getattr(steady, way).delay_s for way in group) + 0.2)
        curves += [_curve(way, made[way], arrived[way], sizes[way], start, begin, seconds) for way in group]
    return curves


def _applied(apply: Callable[[float], object], begin: float) -> float:
    """Puts the link under its traces, and says when they will have come to *begin*: soon, but not before the flow is there.

    The first time may take long, where it starts a process on a slow machine: then again, from a later origin.
    """
    lead = _LEAD_S
    for _ in range(_TRIES):
        told = time.monotonic()
        apply(told + lead - begin)
        took = time.monotonic() - told
        if lead - took >= _READY_S:
            break
        lead = _LEAD_S + took
    return told + lead


def _schedule(profile: Profile, way: str, origin_s: float) -> Schedule | Deliveries | None:
    return getattr(profile, way).schedule(way, origin_s)


def beginning(schedule: Schedule | Deliveries | None, seconds: float) -> float | None:
    """The first second of the trace in which something can be sent; None where no curve can be asked for."""
    if schedule is None or not isfinite(schedule.capacity(0.0, schedule.length_s)):
        return None
    for second in range(int(schedule.length_s) + 1):
        if schedule.capacity(second, second + 1.0) > 0 and isfinite(
            schedule.capacity(second, second + seconds)
        ):
            return float(second)
    return None


def _packet_bytes(schedule: Schedule | Deliveries | None, mean_bps: float) -> int:
    """Full-sized, smaller where a tenth of a second would hold few; deliveries are for full-sized ones."""
    if isinstance(schedule, Deliveries):
        return _FULL_PACKET
    return max(_SMALL_PACKET, min(_FULL_PACKET, int(mean_bps / 8 * BIN_S / 20)))


def _flow(
    profile: Profile, way: str, schedule: Schedule | Deliveries | None, size: int, begin: float, end: float
) -> Flow:
    """Somewhat faster than the trace is anywhere near, so that the queue never runs empty, and not faster: sending costs time."""
    assert schedule is not None
    direction = getattr(profile.steady(), way)
    margin, steps = round(_MARGIN_S / _STEP_S), round((end - begin) / _STEP_S)
    first = begin + direction.delay_s - _MARGIN_S
    rates = [
        schedule.capacity(first + i * _STEP_S, first + (i + 1) * _STEP_S) / _STEP_S * 8
        for i in range(steps + 2 * margin)
    ]
    pace, packets = [], 0.0
    for step in range(steps):
        offered = (
            _OVERLOAD * max(rates[step : step + 2 * margin + 1]) / (1 - min(direction.loss, 0.9)) + _LEAST_BPS
        )
        packets += offered * _STEP_S / 8 / size
        pace.append(((step + 1) * _STEP_S, size * 8 / offered))
    return Flow(
        int(packets) + 100, size, pace[0][1], end - begin, catch_up=True, pace=tuple(pace), begin_s=begin
    )


def _curve(
    way: str,
    schedule: Schedule | Deliveries | None,
    flow: Arrived,
    size: int,
    start: float,
    begin: float,
    seconds: float,
) -> Curve:
    assert schedule is not None
    bins = round(seconds / BIN_S)
    delivered = [0] * bins
    for time_s in flow.arrived_s:
        number = int((time_s - start) / BIN_S) if time_s >= start else -1
        if 0 <= number < bins:
            delivered[number] += size
    asked = [schedule.capacity(start + i * BIN_S, start + (i + 1) * BIN_S) for i in range(bins)]
    return Curve(way, begin, BIN_S, tuple(asked), tuple(delivered))
