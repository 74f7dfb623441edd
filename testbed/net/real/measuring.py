"""What a link between two hosts is: probes both ways, as `testbed.net.calibration` sends them, from processes on the hosts.

Nothing is asked of such a link and nothing judged. Its rate is not known beforehand: flows grow until not all of one arrives, or
until it is as fast as the prober can. One-way delays need the clocks of both hosts to be told apart: where that is not known well
enough, there is the round trip alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, stdev
from typing import Any

from testbed import descriptors
from testbed.errors import NetworkError
from testbed.hosts.host import Host, Process
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.calibration.checks import loss_check, rate_check
from testbed.net.calibration.outcome import RECORDED, Check, Course
from testbed.net.calibration.probes import (
    FULL_PACKET,
    Arrived,
    PacketTrain,
    Prober,
    delay_train,
    loss_train,
)
from testbed.net.profile.profile import MEASURED, Direction, Profile
from testbed.net.profile.trace import WAYS, Way

_STEPS_BPS = (20e6, 80e6, 320e6, 1000e6)
_STEP_S, _FLOW_S, _SETTLE_S = 0.25, 1.2, 0.5
_ARRIVED, _OVER = 0.9, 1.25  # of what was sent: the link holds more; of the rate: what saturates it
_ONE_WAY = 0.05  # how far off a one-way delay may be, of itself
_BIN_S = 0.1
_ANSWER_S = 20.0


@dataclass(frozen=True)
class End:
    """One end of a link."""

    node: str
    host: Host
    address: str


#: By how much the second end's clock is ahead of the first's, and how far that may be off.
Clocks = Callable[[], tuple[float, float]]


def measure(link: str, a: End, b: End, clocks: Clocks, profile: Profile, emulation: str) -> Calibration:
    """The link as it is now, idle; `profile` is told from others by its name alone. Raises NetworkError where probing fails,
    EndpointError where a host cannot be reached."""
    with _probing(a, b) as (prober, size):
        train = delay_train(Direction(), 1.0, None)
        before = clocks()
        sparse = prober.run(dict.fromkeys(WAYS, train), _SETTLE_S)
        after = clocks()
        ahead = (before[0] + after[0]) / 2
        off = max(before[1], after[1]) + abs(after[0] - before[0]) / 2
        flows = {way: _rate(prober, way, size) for way in WAYS}
        checks = {way: _rate_check(way, *flows[way], size) for way in WAYS}
        found = {way: Direction(rate_bps=checks[way].measured or 1e6) for way in WAYS}
        like = Profile(MEASURED.name, found["up"], found["down"])
        dense = prober.run({way: loss_train(like, way, 1.0, None) for way in WAYS}, _SETTLE_S)
    all_checks: list[Check] = []
    for way in WAYS:
        all_checks += [
            checks[way],
            *_delay_checks(way, sparse[way], -ahead if way == "up" else ahead, off),
            replace(loss_check(way, Direction(), dense[way]), asked=None, ok=None, tolerance=RECORDED),
        ]
    all_checks += _round_trip(sparse)
    courses = [_rate_course(way, flows[way][0], size) for way in WAYS]
    courses += [_delay_course(way, sparse[way]) for way in WAYS]
    attempt = Attempt(tuple(all_checks), {}, tuple(_causes(sparse)), courses=tuple(filter(None, courses)))
    return Calibration(link, profile.name, emulation, (attempt,))


@contextlib.contextmanager
def _probing(a: End, b: End) -> Iterator[tuple[Prober, int]]:
    """The processes, and the bytes of a full packet between them."""
    with contextlib.ExitStack() as stack:
        processes = {}
        ports = {}
        for way, end in zip(WAYS, (a, b), strict=True):
            argv = end.host.module("testbed.net.real.end", end.address)
            processes[way] = process = stack.enter_context(end.host.start(argv, {}))
            said = _answer(process, f"the probing process at {end.node}")
            if "error" in said:
                raise NetworkError(
                    f"node {end.node}: cannot listen at {said['error']}; see address: and interface:"
                )
            ports[way] = said["port"]
        for way, other, peer in zip(WAYS, reversed(WAYS), (b, a), strict=True):
            told = json.dumps([peer.address, ports[other]]).encode() + b"\n"
            os.write(processes[way].stdin.fileno(), told)
        # A larger one would be sent in pieces, or, of many in one system call, not at all.
        most = [_answer(process, "a probing process")["mtu"] for process in processes.values()]
        with Prober.of(processes) as prober:
            yield prober, min(FULL_PACKET, *most)


def _answer(process: Process, what: str) -> Any:
    """The line of JSON that a process says first. Raises NetworkError."""
    data = b""
    while not data.endswith(b"\n"):
        if not descriptors.ready([process.stdout], _ANSWER_S):
            raise NetworkError(f"{what} does not answer")
        piece = os.read(process.stdout.fileno(), 1)
        if not piece:
            process.status(1.0)
            raise NetworkError(f"{what} failed: {process.last_words() or 'killed'}")
        data += piece
    return json.loads(data)


def _rate(prober: Prober, way: Way, size: int) -> tuple[Arrived, bool]:
    """A flow of packets of that size that saturates the way, and whether it did."""
    for step in _STEPS_BPS:
        flow = prober.run({way: _flow(step, _STEP_S, size)}, _SETTLE_S)[way]
        sent = flow.sent * size * 8 / flow.took_s
        arrived = rate_check(way, Direction(), flow, size).measured or 0.0
        saturated = arrived < _ARRIVED * sent or len(flow.numbers) < _ARRIVED * flow.sent
        if saturated or sent < _ARRIVED * step:  # or the prober can no more
            break
    if not arrived:
        return flow, False
    return prober.run({way: _flow(min(step, _OVER * arrived), _FLOW_S, size)}, 2 * _SETTLE_S)[way], saturated


def _flow(rate_bps: float, duration_s: float, size: int) -> PacketTrain:
    interval = size * 8 / rate_bps
    return PacketTrain(int(duration_s / interval) + 1, size, interval, duration_s, catch_up=True)


def _rate_check(way: Way, flow: Arrived, saturated: bool, size: int) -> Check:
    check = rate_check(way, Direction(), flow, size)
    return replace(check, ok=None, tolerance=RECORDED if saturated else f"{RECORDED}; at least")


def _delays(flow: Arrived) -> list[float]:
    return [arrived - sent for sent, arrived in zip(flow.sent_s, flow.arrived_s, strict=True)]


def _delay_checks(way: Way, flow: Arrived, ahead_s: float, off_s: float) -> list[Check]:
    """The one-way delay, where the clocks tell, and the jitter."""
    delays = sorted(delay + ahead_s for delay in _delays(flow))
    n = len(delays)
    if n < 2:
        return [Check(way, "delay", None, n=n, tolerance=RECORDED)]
    checks = [Check(way, "jitter", None, stdev(delays), n=n, tolerance=RECORDED)]
    middle, p99 = median(delays), delays[min(n - 1, int(0.99 * n))]
    if off_s <= _ONE_WAY * middle:
        low, high = middle - off_s, middle + off_s
        checks.insert(0, Check(way, "delay", None, middle, low, high, n, None, RECORDED, p99))
    return checks


def _round_trip(flows: Mapping[Way, Arrived]) -> list[Check]:
    """The sum of both ways' medians: whatever the clocks say, it is in both."""
    delays = [_delays(flow) for flow in flows.values()]
    if not all(delays):
        return []
    n = min(map(len, delays))
    return [Check("both", "round trip", None, sum(map(median, delays)), n=n, tolerance=RECORDED)]


def _rate_course(way: Way, flow: Arrived, size: int) -> Course | None:
    if len(flow.arrived_s) < 2:
        return None
    begin = flow.arrived_s[0]
    counts = [0] * (int((max(flow.arrived_s) - begin) / _BIN_S) + 1)
    for at in flow.arrived_s:
        counts[int((at - begin) / _BIN_S)] += 1
    whole = counts[:-1]  # the last part ends early
    return Course(way, "rate", _BIN_S, tuple(count * size * 8 / _BIN_S for count in whole))


def _delay_course(way: Way, flow: Arrived) -> Course | None:
    delays = _delays(flow)
    if not delays:
        return None
    least, begin = min(delays), min(flow.sent_s)
    parts: dict[int, list[float]] = {}
    for sent, delay in zip(flow.sent_s, delays, strict=True):
        parts.setdefault(int((sent - begin) / _BIN_S), []).append(delay - least)
    middles = [median(parts[i]) if i in parts else None for i in range(max(parts) + 1)]
    return Course(way, "excess delay", _BIN_S, tuple(middles))


def _causes(flows: Mapping[Way, Arrived]) -> Sequence[str]:
    silent = [way for way, flow in flows.items() if not flow.numbers]
    return [f"{way}: no probe arrived; does a firewall let UDP through?" for way in silent]
