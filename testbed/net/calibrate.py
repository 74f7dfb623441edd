"""Is the link what was asked for? UDP probes across it, both ways, and a verdict for rate, one-way delay and loss.

Both ends are on one host, so one-way delay is a difference of two readings of one clock. The rate is that of a saturating flow at
the receiver; bytes are the network layer's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from testbed.errors import SpecError
from testbed.net.emulators.contract import Counters
from testbed.net.following import STRETCH_S, Curve, follow
from testbed.net.measure import Check, delay_check, loss_check, rate_check
from testbed.net.probe import MESSAGE, UDP_OVERHEAD
from testbed.net.probing import WAYS, Arrived, Flow, Network, Prober
from testbed.net.profile import Direction, Profile
from testbed.units import format_rate, format_time

ATTEMPTS = 2
_PROBE_BYTES = (
    UDP_OVERHEAD + MESSAGE.size
)  # network layer; the smallest there are: at 1 Mbit/s they take 0.35 ms each
_CLOSEST_S = 0.3e-3  # where a given number of probes is asked for
_OVERLOAD = 1.2  # a saturating flow's rate over the asked one
_UNLIMITED_BPS = 300e6  # what is offered where there is no limit; the result is reported, not judged
_PARALLEL_BPS = (
    60e6  # both ways' saturating flows at once only below this: the processor must not be the limit
)
_FULL_PACKET = 1500
_LONGEST_S = 600.0  # of a flow whose number of packets is given
_SLACK_S = 0.1  # for the last packet of a phase, over what the profile explains
_LATE_S = 2e-3  # lateness of the emulator worth naming as a cause


class CalibratedNetwork(Network, Protocol):
    """What calibration needs of a `Fabric`."""

    @property
    def topology(self) -> Any: ...
    @property
    def emulator(self) -> Any: ...
    def counters(self, link: str) -> dict[str, Counters]: ...
    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None: ...


@dataclass(frozen=True)
class Attempt:
    """One round of measurements, and the emulator's counters over it."""

    checks: tuple[Check, ...]
    counters: dict[str, Counters]
    causes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()  # of a trace

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)


@dataclass(frozen=True)
class Calibration:
    """All attempts, in order; the last one decides."""

    link: str
    profile: str
    emulator: str
    attempts: tuple[Attempt, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether everything judged was within tolerance in the last attempt."""
        return self.attempts[-1].ok

    @property
    def checks(self) -> tuple[Check, ...]:
        """The last attempt's."""
        return self.attempts[-1].checks

    @property
    def cause(self) -> str:
        """What is out of tolerance and, as far as the counters tell, why; empty when nothing is."""
        wrong = [str(check) for check in self.checks if check.ok is False]
        return "; ".join([*wrong, *self.attempts[-1].causes]) if wrong else ""

    def lines(self) -> list[dict[str, Any]]:
        """For people: one line a check, with ``way``, ``what``, ``asked``, ``measured``, ``error`` as text and ``ok``."""
        return [check.line() for check in self.checks]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, the numbers in seconds, bits per second and fractions."""
        return {
            "link": self.link,
            "profile": self.profile,
            "emulator": self.emulator,
            "ok": self.ok,
            "cause": self.cause,
            "attempts": [
                {"ok": attempt.ok, "causes": list(attempt.causes)}
                | {"checks": [asdict(check) for check in attempt.checks]}
                | {"counters": {way: values.record() for way, values in attempt.counters.items()}}
                | ({"curves": [asdict(curve) for curve in attempt.curves]} if attempt.curves else {})
                for attempt in self.attempts
            ],
        }


def calibrate(
    fabric: CalibratedNetwork,
    link: str,
    profile: Profile,
    *,
    quick: bool = False,
    stretch_s: float = STRETCH_S,
    probes: int | None = None,
    attempts: int = ATTEMPTS,
) -> Calibration:
    """Measures a link that is under *profile* (the caller has applied it) and idle.

    What changes over time is measured over *stretch_s* of its trace; rate, delay and loss then under the profile's means.

    Takes three to five seconds on ordinary links, longer where delay or queue are; *quick* halves that and widens the
    intervals; with *probes*, delay and loss are measured with that many packets each way, however long that takes. A
    measurement out of tolerance is repeated, up to *attempts* in all; every one is in the result. Raises SpecError for an
    unknown link, NetworkError when probing fails.
    """
    ends = next((item for item in fabric.topology.links if item.name == link), None)
    if ends is None:
        known = ", ".join(item.name for item in fabric.topology.links)
        raise SpecError(f"there is no link {link!r}; there is {known}")
    made: list[Attempt] = []
    # The relay outranks the probers; netem lives in kernel threads, which they would outrank.
    urgent = fabric.emulator.name == "userspace"
    with Prober(fabric, link, ends.a, ends.b, urgent=urgent) as prober:
        while not made or (not made[-1].ok and len(made) < attempts):
            before = fabric.counters(link)
            if profile.changes:
                fabric.apply(link, profile.steady())
            checks, causes = _attempt(prober, profile.steady(), 0.5 if quick else 1.0, probes)
            curves: list[Curve] = []
            if profile.changes:
                curves = follow(prober, profile, partial(fabric.apply, link, profile), stretch_s)
                checks += [check for curve in curves for check in curve.checks(fabric.emulator.name)]
            after = fabric.counters(link)
            counters = {way: after[way].since(before[way]) for way in WAYS}
            causes += _emulator_causes(counters)
            made.append(Attempt(tuple(checks), counters, tuple(causes), tuple(curves)))
    return Calibration(link, profile.name, fabric.emulator.name, tuple(made))


def _attempt(
    prober: Prober, profile: Profile, scale: float, probes: int | None
) -> tuple[list[Check], list[str]]:
    directions = {"up": profile.up, "down": profile.down}
    settle = {way: _settle_s(profile, way) for way in WAYS}
    rates = _rates(prober, directions, settle, scale)
    jittery = any(direction.jitter_s for direction in directions.values())
    short = {
        way: direction.delay_s + 6 * direction.jitter_s + _SLACK_S for way, direction in directions.items()
    }
    dense = prober.run({way: _loss_flow(profile, way, scale, probes) for way in WAYS}, max(short.values()))
    # Packets keep their order, so closely spaced ones push each other back under jitter: delay needs its own, far apart.
    sparse = dense
    if jittery:
        sparse = prober.run({w: _delay_flow(directions[w], scale) for w in WAYS}, max(short.values()))
    checks, causes = [], []
    for way, direction in directions.items():
        checks += [
            rate_check(way, direction, rates[way], _packet_bytes(direction)),
            delay_check(way, direction, sparse[way], _PROBE_BYTES),
            loss_check(way, direction, dense[way]),
        ]
        if rates[way].held_up_s > _LATE_S:
            causes.append(
                f"{way}: the prober was held up by {format_time(rates[way].held_up_s)}: the processor is busy"
            )
        offered = _offered_bps(rates[way], _packet_bytes(direction))
        if direction.rate_bps and offered < 1.05 * direction.rate_bps / (1 - min(direction.loss, 0.9)):
            causes.append(
                f"{way}: the prober offered no more than {format_rate(offered)}: the processor is too slow or busy"
            )
    return checks, causes


def _rates(
    prober: Prober, directions: dict[str, Direction], settle: dict[str, float], scale: float
) -> dict[str, Arrived]:
    """Saturating flows, both ways at once where the processor carries that."""
    flows = {way: _rate_flow(direction, scale) for way, direction in directions.items()}
    if sum(direction.rate_bps or _UNLIMITED_BPS for direction in directions.values()) <= _PARALLEL_BPS:
        return prober.run(flows, max(settle.values()))
    return {way: prober.run({way: flows[way]}, settle[way])[way] for way in WAYS}


def _settle_s(profile: Profile, way: str) -> float:
    """How long after a saturating flow's last packet something may still arrive."""
    direction = profile.up if way == "up" else profile.down
    waiting = direction.queue_bytes(profile.round_trip_s)
    draining = waiting * 8 / direction.rate_bps if waiting and direction.rate_bps else 0.0
    return direction.delay_s + 6 * direction.jitter_s + draining + _SLACK_S


def _packet_bytes(direction: Direction) -> int:
    """A saturating flow's packet: full-sized, smaller where a second would not hold a hundred of them."""
    return max(200, min(_FULL_PACKET, int((direction.rate_bps or 1e12) / 8 / 100)))


def _rate_flow(direction: Direction, scale: float) -> Flow:
    size = _packet_bytes(direction)
    offered = _UNLIMITED_BPS
    if direction.rate_bps:
        # Loss comes before the bottleneck; what is left must still saturate it.
        offered = _OVERLOAD * direction.rate_bps / (1 - min(direction.loss, 0.9))
    duration = (1.2 if direction.rate_bps else 0.5) * scale
    duration = max(duration, min(6.0, 40 * size * 8 / offered))  # forty packets at least
    interval = size * 8 / offered
    return Flow(int(duration / interval) + 1, size, interval, duration, catch_up=True)


def _loss_flow(profile: Profile, way: str, scale: float, probes: int | None) -> Flow:
    """Probes that never fill the queue: under half the rate, and what jitter may bunch together fits in half of the queue."""
    direction = profile.up if way == "up" else profile.down
    packets, duration = int((2000 if direction.loss else 800) * scale), 2.0 * scale
    interval = 0.9e-3 if direction.loss else 1.5e-3
    if probes is not None:
        packets, duration, interval = probes, _LONGEST_S, _CLOSEST_S
    if direction.rate_bps:
        interval = max(interval, 2 * _PROBE_BYTES * 8 / direction.rate_bps)
        waiting = direction.queue_bytes(profile.round_trip_s) or _FULL_PACKET
        interval = max(interval, 8 * direction.jitter_s * _PROBE_BYTES / (waiting / 2))
    return Flow(packets, _PROBE_BYTES, interval, duration)


def _delay_flow(direction: Direction, scale: float) -> Flow:
    interval = max(8e-3, 5 * direction.jitter_s)
    return Flow(10_000, _PROBE_BYTES, interval, 1.3 * scale)


def _offered_bps(flow: Arrived, size: int) -> float:
    return flow.sent * size * 8 / flow.took_s if flow.took_s else 0.0


def _emulator_causes(counters: dict[str, Counters]) -> list[str]:
    said = [said for way in WAYS for said in counters[way].complaints(way, _LATE_S)]
    return [f"{cause}: the processor is too slow or busy" for cause in said]
