"""Is the link what was asked for? UDP probes across it, both ways, and a verdict for rate, one-way delay and loss; for jitter,
bursts and traces where the profile asks for them.

Both ends are on one host, so one-way delay is a difference of two readings of one clock. The rate is that of a saturating flow at
the receiver; bytes are the network layer's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from testbed.errors import SpecError, UsageError
from testbed.net.calibration.checks import (
    Check,
    burst_check,
    delay_check,
    jitter_checks,
    loss_check,
    rate_check,
)
from testbed.net.calibration.outcome import Course, Curve, Track
from testbed.net.calibration.probes import (
    PARALLEL_BPS,
    PROBE_BYTES,
    SLACK_S,
    UNLIMITED_BPS,
    Arrived,
    Network,
    Prober,
    delay_train,
    loss_train,
    measuring_s,
    packet_bytes,
    rate_train,
    settle_s,
)
from testbed.net.calibration.traces import STRETCH_S, curve_checks, follow, follow_values
from testbed.net.emulators.emulator import Counters
from testbed.net.profile.profile import Profile
from testbed.net.profile.trace import WAYS, Way
from testbed.units import format_duration, format_rate, format_time

ATTEMPTS = 2
_LATE_S = 2e-3  # lateness of the emulator worth naming as a cause
_LONGEST_S, _LONG_S = 300.0, 15.0  # of one measurement: more is refused; more is foretold


def foretell(profile: Profile) -> str:
    """How long measuring a link under this profile takes, for people; empty where it is the usual few seconds. Raises UsageError
    where it is longer than anybody would wait, and SpecError where a trace cannot be read."""
    seconds = measuring_s(profile.steady())
    if seconds > _LONGEST_S:
        raise UsageError(
            f"profile {profile.name}: measuring it takes more than {format_duration(_LONGEST_S)}, since at its mean rate "
            "the queue takes as long to drain; give a smaller queue=, or more rate (a trace: scale=)"
        )
    return f", some {format_duration(seconds)}" if seconds > _LONG_S else ""


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
    curves: tuple[Curve, ...] = ()  # of a trace's rate
    tracks: tuple[Track, ...] = ()  # of its delay and loss
    courses: tuple[Course, ...] = ()  # of a link that is what it is

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
                | {
                    name: [asdict(line) for line in lines]
                    for name, lines in (
                        ("curves", attempt.curves),
                        ("tracks", attempt.tracks),
                        ("courses", attempt.courses),
                    )
                    if lines
                }
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
    share: float = 1.0,
) -> Calibration:
    """Measures a link that is under *profile* (the caller has applied it) and idle.

    What changes over time is measured over *stretch_s* of its trace; rate, delay and loss then under the profile's means. Of the
    profile's rate the link is asked for *share*: that which it has in its cell while all others are silent.

    Takes three to five seconds on ordinary links, longer where delay or queue are; *quick* halves that and widens the
    intervals; with *probes*, delay and loss are measured with that many packets each way, however long that takes. A
    measurement out of tolerance is repeated, up to *attempts* in all; every one is in the result. Raises SpecError for an
    unknown link, NetworkError when probing fails.
    """
    ends = next((item for item in fabric.topology.links if item.name == link), None)
    if ends is None:
        known = ", ".join(item.name for item in fabric.topology.links)
        raise SpecError(f"there is no link {link!r}; there is {known}")
    done: list[Attempt] = []
    asked = profile.scaled(share)
    with Prober(fabric, link, ends.a, ends.b, urgent=fabric.emulator.served_by_processes) as prober:
        while not done or (not done[-1].ok and len(done) < attempts):
            before = fabric.counters(link)
            if profile.changes:
                fabric.apply(link, profile.steady())
            checks, causes = _attempt(prober, asked.steady(), 0.5 if quick else 1.0, probes)
            curves: list[Curve] = []
            tracks: list[Track] = []
            if profile.changes:
                curves = follow(prober, asked, partial(fabric.apply, link, profile), stretch_s)
                checks += [check for curve in curves for check in curve_checks(curve, fabric.emulator)]
                tracks, followed = follow_values(
                    prober, asked, partial(fabric.apply, link, profile), stretch_s
                )
                checks += followed
            after = fabric.counters(link)
            counters = {str(way): after[way].since(before[way]) for way in WAYS}
            causes += _emulator_causes(counters)
            done.append(Attempt(tuple(checks), counters, tuple(causes), tuple(curves), tuple(tracks)))
    return Calibration(link, profile.name, fabric.emulator.name, tuple(done))


def _attempt(
    prober: Prober, profile: Profile, scale: float, probes: int | None
) -> tuple[list[Check], list[str]]:
    directions = profile.ways
    rates = _rates(prober, profile, scale)
    jittery = any(direction.jitter_s for direction in directions.values())
    short = max(direction.delay_s + 6 * direction.jitter_s + SLACK_S for direction in directions.values())
    dense = prober.run({way: loss_train(profile, way, scale, probes) for way in WAYS}, short)
    # Packets keep their order, so closely spaced ones push each other back under jitter: delay needs its own, far apart.
    sparse = dense
    if jittery:
        sparse = prober.run({way: delay_train(directions[way], scale, probes) for way in WAYS}, short)
    checks, causes = [], []
    for way, direction in directions.items():
        checks += [
            rate_check(way, direction, rates[way], packet_bytes(direction)),
            delay_check(way, direction, sparse[way], PROBE_BYTES),
            loss_check(way, direction, dense[way]),
            *jitter_checks(way, direction, sparse[way], PROBE_BYTES),
        ]
        if direction.loss_model is not None:
            checks.append(burst_check(way, direction.loss_model, dense[way]))
        if rates[way].held_up_s > _LATE_S:
            causes.append(
                f"{way}: the prober was held up by {format_time(rates[way].held_up_s)}: the processor is busy"
            )
        offered = _offered_bps(rates[way], packet_bytes(direction))
        if direction.rate_bps and offered < 1.05 * direction.rate_bps / (1 - min(direction.loss, 0.9)):
            causes.append(
                f"{way}: the prober offered no more than {format_rate(offered)}: the processor is too slow or busy"
            )
    return checks, causes


def _rates(prober: Prober, profile: Profile, scale: float) -> dict[Way, Arrived]:
    """Saturating flows, both ways at once where the processor carries that."""
    trains = {way: rate_train(direction, scale) for way, direction in profile.ways.items()}
    settle = {way: settle_s(profile, way) for way in WAYS}
    if sum(direction.rate_bps or UNLIMITED_BPS for direction in profile.ways.values()) <= PARALLEL_BPS:
        return prober.run(trains, max(settle.values()))
    return {way: prober.run({way: trains[way]}, settle[way])[way] for way in WAYS}


def _offered_bps(flow: Arrived, size: int) -> float:
    return flow.sent * size * 8 / flow.took_s if flow.took_s else 0.0


def _emulator_causes(counters: dict[str, Counters]) -> list[str]:
    complaints = [each for way in WAYS for each in counters[way].complaints(way, _LATE_S)]
    return [f"{cause}: the processor is too slow or busy" for cause in complaints]


@contextlib.contextmanager
def busy_cores(wanted: bool = True) -> Iterator[None]:
    """Keeps every core busy while the block runs, where *wanted*, by processes of ordinary priority."""
    spin = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)] if wanted else []
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
