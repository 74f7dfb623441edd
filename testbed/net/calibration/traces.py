"""Does a link follow its trace? Of a rate: a flow that saturates the link over a stretch of the trace, and what arrived in every
tenth of a second beside what the trace has for it. Of delay or loss: probes, each beside what the trace says at its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from statistics import median

from testbed.net.calibration.checks import CONFIDENCE, DELAY_TOLERANCE_S, Check, clopper_pearson
from testbed.net.calibration.outcome import Curve, Track
from testbed.net.calibration.probes import PROBE_BYTES, SLACK_S, WAYS, Arrived, Flow, Prober
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.profile import Direction, Profile
from testbed.net.profile.schedule import Schedule
from testbed.units import format_time

BIN_S = 0.1
STRETCH_S = 8.0
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


_INTERVAL_S = 0.9e-3
_VALUES_LEAD_S = 0.2
_QUEUED_S = 20e-3  # a probe that has to wait longer says nothing of delay, and may be dropped: not counted
_EXPECTED = 5.0  # losses in a part of the stretch, at least: below, chi-square's distribution is another


@dataclass(frozen=True)
class Probe:
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
    made = {way: getattr(profile, way).schedule(way, 0.0) for way in WAYS}
    ways = [way for way, one in made.items() if one is not None and (one.delays or one.losses)]
    if not ways:
        return [], []
    begin = min(beginning(made[way], seconds) or 0.0 for way in ways)
    start = time.monotonic() + _VALUES_LEAD_S
    apply(start - begin)
    steady = profile.steady()
    flow = Flow(1_000_000, PROBE_BYTES, _interval(steady), seconds + _VALUES_LEAD_S)
    arrived = prober.run(dict.fromkeys(ways, flow), _settle(profile, ways))
    tracks, checks = [], []
    for way in ways:
        direction = getattr(profile, way)
        schedule = direction.schedule(way, start - begin)
        assert schedule is not None
        within = (start, start + seconds)
        probes = [p for p in expected(direction, schedule, arrived[way]) if within[0] <= p.sent_s < within[1]]
        for what in ("delay", "loss"):
            if getattr(schedule, "delays" if what == "delay" else "losses") is not None:
                tracks.append(_track(way, what, probes, start, begin, seconds))
                checks += (
                    [delay_track_check(way, direction, probes)]
                    if what == "delay"
                    else loss_track_checks(way, probes)
                )
    return tracks, checks


def expected(direction: Direction, schedule: Schedule | Deliveries, flow: Arrived) -> list[Probe]:
    """Every probe beside what the trace says, in the order in which they were sent, without those that have to queue for long.

    A probe travels as long as the trace says when it enters, no packet overtakes another, and they are sent one after the other
    at the trace's rate, or the profile's. When lost ones were sent follows from those around them.
    """
    delays = dict(
        zip(
            flow.numbers,
            (a - s for s, a in zip(flow.sent_s, flow.arrived_s, strict=True)),
            strict=True,
        )
    )
    known = sorted(zip(flow.numbers, flow.sent_s, strict=True))
    limited = isinstance(schedule, Deliveries) or schedule.rates is not None
    size = PROBE_BYTES + direction.overhead_bytes
    own = size * 8 / direction.rate_bps if direction.rate_bps else 0.0
    found, last, free = [], 0.0, 0.0
    for number, sent in _all_sent(known):
        told = schedule.delay_at(sent)
        arrival = last = max(last, sent + (direction.delay_s if told is None else told))
        begin = max(arrival, free)
        free = schedule.finish(begin, size) if limited else begin + own
        if free - arrival <= _QUEUED_S:
            loss = schedule.loss_at(sent)
            found.append(
                Probe(sent, free - sent, direction.loss if loss is None else loss, delays.get(number))
            )
    return found


def delay_track_check(way: str, direction: Direction, probes: list[Probe]) -> Check:
    """How far a probe's delay is from what the trace says at its time: the median, and what 99 in 100 stay within. Not judged
    under jitter, which is as far."""
    errors = sorted(abs(p.delay_s - p.asked_delay_s) for p in probes if p.delay_s is not None)
    n, tolerance = len(errors), f"≤ {format_time(DELAY_TOLERANCE_S)}"
    if not n:
        return Check(way, "delay trace", 0.0, None, None, None, 0, None, tolerance)
    middle = median(errors)
    ok = None if direction.jitter_s else middle <= DELAY_TOLERANCE_S
    p99 = errors[min(n - 1, math.ceil(0.99 * n) - 1)]
    return Check(way, "delay trace", 0.0, middle, None, None, n, ok, tolerance, p99)


def loss_track_checks(way: str, probes: list[Probe]) -> list[Check]:
    """Whether as many probes were lost as the trace says, in all (binomial 99 % interval) and from part to part (chi-square
    per degree of freedom, Pearson 1900)."""
    n = len(probes)
    if not n:
        return [Check(way, "loss trace", None, None, None, None, 0, None, "99% interval")]
    lost, asked = sum(p.delay_s is None for p in probes), sum(p.asked_loss for p in probes)
    low, high = clopper_pearson(lost, n)
    total = Check(
        way, "loss trace", asked / n, lost / n, low, high, n, low <= asked / n <= high, "99% interval"
    )
    parts = _parts(probes)
    if len(parts) < 3:
        return [total]
    square = sum((seen - wanted) ** 2 / spread for seen, wanted, spread in parts)
    limit = _chi_square(len(parts)) / len(parts)
    measured = square / len(parts)
    return [
        total,
        Check(way, "loss shape", 1.0, measured, None, None, n, measured <= limit, f"≤ {limit:.2f}"),
    ]


def _all_sent(known: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Number and time of every probe between the first and the last that arrived."""
    found: list[tuple[int, float]] = []
    for number, sent in known:
        if found:
            before, then = found[-1]
            if number == before:  # a duplicate
                continue
            gap = (sent - then) / (number - before)
            found += [(n, then + gap * (n - before)) for n in range(before + 1, number)]
        found.append((number, sent))
    return found


def _parts(probes: list[Probe]) -> list[tuple[int, float, float]]:
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


def _track(way: str, what: str, probes: list[Probe], start: float, begin: float, seconds: float) -> Track:
    bins: list[list[Probe]] = [[] for _ in range(round(seconds / BIN_S))]
    for probe in probes:
        number = int((probe.sent_s - start) / BIN_S)
        if number < len(bins) and (what == "loss" or probe.delay_s is not None):
            bins[number].append(probe)
    if what == "delay":
        asked = [_mean([p.asked_delay_s for p in part]) for part in bins]
        measured = [_mean([p.delay_s for p in part if p.delay_s is not None]) for part in bins]
    else:
        asked = [_mean([p.asked_loss for p in part]) for part in bins]
        measured = [_mean([float(p.delay_s is None) for p in part]) for part in bins]
    return Track(way, what, begin, BIN_S, tuple(asked), tuple(measured))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _interval(steady: Profile) -> float:
    rates = [d.rate_bps for d in (steady.up, steady.down) if d.rate_bps]
    return max(_INTERVAL_S, *(2 * PROBE_BYTES * 8 / rate for rate in rates)) if rates else _INTERVAL_S


def _settle(profile: Profile, ways: list[str]) -> float:
    longest = 0.0
    for way in ways:
        direction = getattr(profile, way)
        schedule = direction.schedule(way, 0.0)
        delays = getattr(schedule, "delays", None)
        longest = max(longest, max(delays) if delays else direction.delay_s, 6 * direction.jitter_s)
    return min(longest, 5.0) + SLACK_S + _QUEUED_S
