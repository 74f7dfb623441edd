"""Does a link follow its trace? Of a rate: a flow that saturates the link over a stretch of the trace, and what arrived in every
tenth of a second beside what the trace has for it. Of delay or loss: probes, each beside what the trace says at its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Literal

from testbed.net.calibration.checks import CONFIDENCE, DELAY_TOLERANCE_S, clopper_pearson
from testbed.net.calibration.outcome import Check, Curve, Track
from testbed.net.calibration.probes import (
    FULL_PACKET,
    PARALLEL_BPS,
    PROBE_BYTES,
    SLACK_S,
    Arrived,
    PacketTrain,
    Prober,
)
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.profile import Direction, Profile
from testbed.net.profile.schedule import Schedule
from testbed.net.profile.trace import Way
from testbed.units import format_fraction, format_time

if TYPE_CHECKING:
    from testbed.net.emulators.emulator import Emulator

BIN_S = 0.1
STRETCH_S = 8.0
_LEAD_S = 1.0  # the flow is there before the stretch begins: the queue stands when it does
_READY_S = 0.7  # so much of that has to be left when the link is under the trace, to tell the senders
_TRIES = 3
_STEP_S = 0.02  # how often the flow's rate changes
_MARGIN_S = 0.08  # it is as fast as the trace is anywhere within this time before or after
_OVERLOAD = 1.15
_LEAST_BPS = 200e3
_SMALL_PACKET = 200


@dataclass(frozen=True)
class Stretch:
    """A part of a trace: where it begins in the trace, when that is (CLOCK_MONOTONIC), and how long it lasts."""

    begin_s: float
    at_s: float
    seconds: float

    @property
    def bins(self) -> int:
        """How many times `BIN_S` it lasts."""
        return round(self.seconds / BIN_S)

    def bin_of(self, time_s: float) -> int | None:
        """The number of the bin that a time is in; None: in none."""
        number = int((time_s - self.at_s) / BIN_S)
        return number if time_s >= self.at_s and number < self.bins else None


def follow(
    prober: Prober, profile: Profile, apply: Callable[[float], object], seconds: float = STRETCH_S
) -> list[Curve]:
    """A curve for each way whose rate changes between limits. *apply* puts the link under the profile, its traces beginning at
    the time given. Raises NetworkError when probing fails."""
    begins = {
        way: begin
        for way, direction in profile.ways.items()
        if (begin := beginning(direction.schedule(way, 0.0), seconds)) is not None
    }
    steady = profile.steady().ways
    together = sum(steady[way].rate_bps or 0.0 for way in begins) <= PARALLEL_BPS
    curves = []
    for group in [list(begins)] if begins and together else [[way] for way in begins]:
        # One origin for both: they begin where the first of them has something to send.
        begin = min(begins[way] for way in group)
        start = _applied(apply, begin)
        schedules = {way: _schedule(profile, way, start - begin) for way in group}
        sizes = {way: _packet_bytes(schedules[way], steady[way].rate_bps or 0.0) for way in group}
        trains = {
            way: _train(steady[way], schedules[way], sizes[way], time.monotonic(), start + seconds)
            for way in group
        }
        arrived = prober.run(trains, max(steady[way].delay_s for way in group) + 0.2)
        stretch = Stretch(begin, start, seconds)
        curves += [_curve(way, schedules[way], arrived[way], sizes[way], stretch) for way in group]
    return curves


def _applied(apply: Callable[[float], object], begin: float) -> float:
    """Puts the link under its traces, and says when they will have come to *begin*: soon, but not before the flow is there.

    The first time may take long, where it starts a process on a slow machine: then again, from a later origin.
    """
    lead = _LEAD_S
    for _ in range(_TRIES):
        asked = time.monotonic()
        apply(asked + lead - begin)
        took = time.monotonic() - asked
        if lead - took >= _READY_S:
            break
        lead = _LEAD_S + took
    return asked + lead


def _schedule(profile: Profile, way: Way, origin_s: float) -> Schedule | Deliveries:
    schedule = profile.ways[way].schedule(way, origin_s)
    assert schedule is not None
    return schedule


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


def _packet_bytes(schedule: Schedule | Deliveries, mean_bps: float) -> int:
    """Full-sized, smaller where a tenth of a second would hold few; deliveries are for full-sized ones."""
    if isinstance(schedule, Deliveries):
        return FULL_PACKET
    return max(_SMALL_PACKET, min(FULL_PACKET, int(mean_bps / 8 * BIN_S / 20)))


def _train(
    direction: Direction, schedule: Schedule | Deliveries, size: int, begin: float, end: float
) -> PacketTrain:
    """Somewhat faster than the trace is anywhere near, so that the queue never runs empty, and not faster: sending costs time."""
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
    return PacketTrain(
        int(packets) + 100, size, pace[0][1], end - begin, catch_up=True, pace=tuple(pace), begin_s=begin
    )


def _curve(way: Way, schedule: Schedule | Deliveries, flow: Arrived, size: int, stretch: Stretch) -> Curve:
    delivered = [0] * stretch.bins
    for time_s in flow.arrived_s:
        if (number := stretch.bin_of(time_s)) is not None:
            delivered[number] += size
    edges = [stretch.at_s + i * BIN_S for i in range(stretch.bins + 1)]
    asked = [schedule.capacity(begin, end) for begin, end in pairwise(edges)]
    return Curve(way, stretch.begin_s, BIN_S, tuple(asked), tuple(delivered))


def curve_checks(curve: Curve, emulator: type[Emulator] | Emulator) -> list[Check]:
    """Whether the rate changed as asked (the correlation), and what arrived in all, in the emulator's tolerances."""
    least, most_off = emulator.least_correlation, emulator.most_off
    asked, delivered = curve.totals
    n, shape = len(curve.asked_bytes), curve.correlation
    follows = None if shape is None else shape >= least
    fits, tolerance = abs(delivered - asked) <= most_off * asked, f"±{format_fraction(most_off)}"
    return [
        Check(curve.way, "rate shape", 1.0, shape, n=n, ok=follows, tolerance=f"≥ {least}"),
        Check(curve.way, "rate trace", asked, delivered, n=n, ok=fits, tolerance=tolerance),
    ]


_INTERVAL_S = 0.9e-3
_VALUES_LEAD_S = 0.2
_QUEUED_S = 20e-3  # a probe that has to wait longer says nothing of delay, and may be dropped: not counted
_EXPECTED = 5.0  # losses in a part of the stretch, at least: below, chi-square's distribution is another


@dataclass(frozen=True)
class Observation:
    """One probe: when it was sent, what the trace says of it, and what became of it (None: lost)."""

    sent_s: float
    asked_delay_s: float
    asked_loss: float
    delay_s: float | None


def follow_values(
    prober: Prober, profile: Profile, apply: Callable[[float], object], seconds: float = STRETCH_S
) -> tuple[list[Track], list[Check]]:
    """Tracks and verdicts of each way whose trace gives delay or loss. *apply* puts the link under the profile, its traces
    beginning at the time given. Raises NetworkError when probing fails."""
    begins = {
        way: beginning(schedule, seconds) or 0.0
        for way, direction in profile.ways.items()
        if (schedule := direction.schedule(way, 0.0)) is not None and (schedule.delays or schedule.losses)
    }
    if not begins:
        return [], []
    begin = min(begins.values())
    start = time.monotonic() + _VALUES_LEAD_S
    apply(start - begin)
    steady = profile.steady()
    stretch = Stretch(begin, start, seconds)
    train = PacketTrain(1_000_000, PROBE_BYTES, _interval(steady), seconds + _VALUES_LEAD_S)
    arrived = prober.run(dict.fromkeys(begins, train), _settle(profile, begins))
    tracks: list[Track] = []
    checks: list[Check] = []
    for way in begins:
        direction, schedule = profile.ways[way], _schedule(profile, way, start - begin)
        observed = expected(direction, schedule, arrived[way])
        probes = [probe for probe in observed if stretch.bin_of(probe.sent_s) is not None]
        if schedule.delays is not None:
            tracks.append(_track(way, "delay", probes, stretch))
            checks.append(delay_track_check(way, direction, probes))
        if schedule.losses is not None:
            tracks.append(_track(way, "loss", probes, stretch))
            checks += loss_track_checks(way, probes)
    return tracks, checks


def expected(direction: Direction, schedule: Schedule | Deliveries, flow: Arrived) -> list[Observation]:
    """Every probe beside what the trace says, in the order in which they were sent, without those that have to queue for long.

    A probe travels as long as the trace says when it enters, no packet overtakes another, and they are sent one after the other
    at the trace's rate, or the profile's. When lost ones were sent follows from those around them.
    """
    packets = zip(flow.numbers, flow.sent_s, flow.arrived_s, strict=True)
    delays = {number: arrived - sent for number, sent, arrived in packets}
    known = sorted(zip(flow.numbers, flow.sent_s, strict=True))
    size = PROBE_BYTES + direction.overhead_bytes
    own = size * 8 / direction.rate_bps if direction.rate_bps else 0.0
    observations, last, free = [], 0.0, 0.0
    for number, sent in _all_sent(known):
        delay = schedule.delay_at(sent)
        arrival = last = max(last, sent + (direction.delay_s if delay is None else delay))
        begin = max(arrival, free)
        free = schedule.finish(begin, size) if schedule.gives_rate else begin + own
        if free - arrival <= _QUEUED_S:
            loss = schedule.loss_at(sent)
            asked = direction.loss if loss is None else loss
            observations.append(Observation(sent, free - sent, asked, delays.get(number)))
    return observations


def delay_track_check(way: str, direction: Direction, probes: list[Observation]) -> Check:
    """How far a probe's delay is from what the trace says at its time: the median, and what 99 in 100 stay within. Not judged
    under jitter, which is as far."""
    errors = sorted(abs(p.delay_s - p.asked_delay_s) for p in probes if p.delay_s is not None)
    n, tolerance = len(errors), f"≤ {format_time(DELAY_TOLERANCE_S)}"
    if not n:
        return Check(way, "delay trace", 0.0, tolerance=tolerance)
    middle = median(errors)
    ok = None if direction.jitter_s else middle <= DELAY_TOLERANCE_S
    p99 = errors[min(n - 1, math.ceil(0.99 * n) - 1)]
    return Check(way, "delay trace", 0.0, middle, n=n, ok=ok, tolerance=tolerance, p99=p99)


def loss_track_checks(way: str, probes: list[Observation]) -> list[Check]:
    """Whether as many probes were lost as the trace says, in all (binomial 99 % interval) and from part to part (chi-square
    per degree of freedom, Pearson 1900)."""
    n = len(probes)
    if not n:
        return [Check(way, "loss trace", None, tolerance="99% interval")]
    lost, asked = sum(p.delay_s is None for p in probes), sum(p.asked_loss for p in probes) / n
    low, high = clopper_pearson(lost, n)
    mean = Check(way, "loss trace", asked, lost / n, low, high, n, low <= asked <= high, "99% interval")
    parts = _parts(probes)
    if len(parts) < 3:
        return [mean]
    square = sum((seen - wanted) ** 2 / spread for seen, wanted, spread in parts)
    limit = _chi_square(len(parts)) / len(parts)
    measured = square / len(parts)
    shape = Check(way, "loss shape", 1.0, measured, n=n, ok=measured <= limit, tolerance=f"≤ {limit:.2f}")
    return [mean, shape]


def _all_sent(known: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Number and time of every probe between the first and the last that arrived."""
    probes: list[tuple[int, float]] = []
    for number, sent in known:
        if probes:
            before, then = probes[-1]
            if number == before:  # a duplicate
                continue
            gap = (sent - then) / (number - before)
            probes += [(n, then + gap * (n - before)) for n in range(before + 1, number)]
        probes.append((number, sent))
    return probes


def _parts(probes: list[Observation]) -> list[tuple[int, float, float]]:
    """Lost, expected and its variance, in consecutive parts with enough expected each; what is left over goes with the last."""
    parts: list[tuple[int, float, float]] = []
    seen, wanted, spread = 0, 0.0, 0.0
    for probe in probes:
        seen += probe.delay_s is None
        wanted += probe.asked_loss
        spread += probe.asked_loss * (1 - probe.asked_loss)
        if spread >= _EXPECTED:
            parts.append((seen, wanted, spread))
            seen, wanted, spread = 0, 0.0, 0.0
    if parts:
        last = parts[-1]
        parts[-1] = (last[0] + seen, last[1] + wanted, last[2] + spread)
    return parts


def _chi_square(degrees: int) -> float:
    from scipy.special import chdtri

    return float(chdtri(degrees, 1 - CONFIDENCE))


def _track(way: Way, what: Literal["delay", "loss"], probes: list[Observation], stretch: Stretch) -> Track:
    bins: list[list[Observation]] = [[] for _ in range(stretch.bins)]
    for probe in probes:
        number = stretch.bin_of(probe.sent_s)
        if number is not None and (what == "loss" or probe.delay_s is not None):
            bins[number].append(probe)
    if what == "delay":
        asked = [_mean([p.asked_delay_s for p in part]) for part in bins]
        measured = [_mean([p.delay_s for p in part if p.delay_s is not None]) for part in bins]
    else:
        asked = [_mean([p.asked_loss for p in part]) for part in bins]
        measured = [_mean([float(p.delay_s is None) for p in part]) for part in bins]
    return Track(way, what, stretch.begin_s, BIN_S, tuple(asked), tuple(measured))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _interval(steady: Profile) -> float:
    rates = [d.rate_bps for d in (steady.up, steady.down) if d.rate_bps]
    return max(_INTERVAL_S, *(2 * PROBE_BYTES * 8 / rate for rate in rates)) if rates else _INTERVAL_S


def _settle(profile: Profile, ways: Iterable[Way]) -> float:
    longest = 0.0
    for way in ways:
        direction, delays = profile.ways[way], _schedule(profile, way, 0.0).delays
        longest = max(longest, max(delays) if delays else direction.delay_s, 6 * direction.jitter_s)
    return min(longest, 5.0) + SLACK_S + _QUEUED_S
