"""Does a link follow a trace of delay or of loss? Probes across a stretch of it, each beside what the trace says at its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from testbed.net.calibration.checks import CONFIDENCE, DELAY_TOLERANCE_S, Check, clopper_pearson
from testbed.net.calibration.probe_flows import PROBE_BYTES, SLACK_S
from testbed.net.calibration.probes import WAYS, Arrived, Flow, Prober
from testbed.net.calibration.traces import BIN_S, STRETCH_S, beginning
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.profile import Direction, Profile
from testbed.net.profile.schedule import Schedule
from testbed.units import format_time

_INTERVAL_S = 0.9e-3
_LEAD_S = 0.2
_QUEUED_S = 20e-3  # a probe that has to wait longer says nothing of delay, and may be dropped: not counted
_EXPECTED = 5.0  # losses in a part of the stretch, at least: below, chi-square's distribution is another


@dataclass(frozen=True)
class Track:
    """Means over equal parts of one stretch of a trace, as asked and as measured; None where no probe tells."""

    way: str
    what: str  # "delay" (seconds) or "loss" (fractions)
    begin_s: float  # in the trace, after its offset
    bin_s: float
    asked: tuple[float | None, ...]
    measured: tuple[float | None, ...]


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
    start = time.monotonic() + _LEAD_S
    apply(start - begin)
    steady = profile.steady()
    flow = Flow(1_000_000, PROBE_BYTES, _interval(steady), seconds + _LEAD_S)
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
