"""What this machine carries: the fastest link, and the most over several links at once, that kept what they were asked for.

It is measured once (`measure`), by more and more until it is too much, and kept in a file with the machine it was measured on.
What is asked for is held against that (`beyond`) before anything is built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from testbed.errors import StorageError, TestbedError
from testbed.files import read
from testbed.net.calibration.checks import rate_check
from testbed.net.calibration.load import TCP_SHARE, loaded
from testbed.net.calibration.probes import Prober, packet_bytes, rate_train
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from testbed.units import format_rate

RATES_BPS = (0.1e9, 0.5e9, 1e9, 2e9, 3e9, 5e9, 7.5e9, 10e9)
LINKS = 8
LATE_S = 5e-3  # of a packet's leaving: what a row warns of
UNKNOWN_ABOVE_BPS = 1e9
"""Up to here what has not been measured is not remarked on: a run measures each of its links anyway."""
_TOLERANCE, _ATTEMPTS = 0.03, 2
_SETTLE_S, _SECONDS = 1.5, 1.5


class Step(msgspec.Struct, frozen=True):
    """One rate that was asked of one link, or of several together, and what arrived; bits per second."""

    links: int
    asked_bps: float
    measured_bps: float
    worst_lateness_s: float
    ok: bool


class Capacity(msgspec.Struct, frozen=True):
    """What a machine was measured to carry; 0 where it was less than the least that was asked of it."""

    machine: dict[str, Any]
    emulator: str
    link_bps: float  # one link, UDP at full packets
    sum_bps: float  # `LINKS` links together, one TCP flow up each
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.emulator}: one link {_most(self.link_bps)}, {LINKS} links together {_most(self.sum_bps)}"
        )


def measure(
    build: Callable[[Topology], Any], machine: dict[str, Any], say: Callable[[str], None]
) -> Capacity:
    """Measures what this machine carries now, which takes about a minute. *build* makes a `Fabric` of a topology, *say* takes
    a line about each step. Raises what both raise, and NetworkError."""
    steps: list[Step] = []
    most, emulator = {1: 0.0, LINKS: 0.0}, ""
    for links in most:
        for rate in RATES_BPS:
            for _ in range(_ATTEMPTS):
                with build(_star(links, rate / links)) as fabric:
                    emulator = fabric.emulator.name
                    step = _one(fabric, rate) if links == 1 else _together(fabric, rate)
                steps.append(step)
                say(
                    f"{links} link{'s' * (links > 1)}, {format_rate(rate)}: {format_rate(step.measured_bps)}, "
                    f"late by {1e3 * step.worst_lateness_s:.1f} ms at most: {'carried' if step.ok else 'too much'}"
                )
                if step.ok:
                    break
            if not steps[-1].ok:
                break
            most[links] = rate
    return Capacity(machine, emulator, most[1], most[LINKS], tuple(steps))


def _star(links: int, rate_bps: float) -> Topology:
    profile = parse_profile(f"rate={rate_bps:.0f}bit,delay=5ms")
    names = [f"n{number}" for number in range(1, links + 1)]
    return Topology(
        "capacity",
        (Node("hub"), *map(Node, names)),
        tuple(Link(f"to-{name}", name, "hub", profile) for name in names),
    )


def _one(fabric: Any, rate_bps: float) -> Step:
    (link,) = fabric.topology.links
    direction = link.profile.up
    with Prober(fabric, link.name, link.a, link.b, urgent=fabric.emulator.served_by_processes) as prober:
        flow = prober.run({"up": rate_train(direction, 1.0)}, 0.3)["up"]
    measured = rate_check("up", direction, flow, packet_bytes(direction)).measured or 0.0
    return _step(fabric, rate_bps, measured, rate_bps)


def _together(fabric: Any, rate_bps: float) -> Step:
    with loaded(fabric, fabric.topology.links) as load:
        measured = sum(load.rates_bps(_SETTLE_S, _SECONDS).values())
    return _step(fabric, rate_bps, measured / TCP_SHARE, rate_bps)


def _step(fabric: Any, rate_bps: float, measured_bps: float, asked_bps: float) -> Step:
    links = fabric.topology.links
    late = max(fabric.counters(link.name)["up"].worst_lateness_s for link in links)
    ok = abs(measured_bps - asked_bps) <= _TOLERANCE * asked_bps and late <= LATE_S
    return Step(len(links), rate_bps, measured_bps, late, ok)


def load_capacity(path: Path, machine: dict[str, Any]) -> Capacity | None:
    """What was measured on this very *machine*; None where nothing was, or the file is none of ours."""
    try:
        capacity = msgspec.json.decode(read(path), type=Capacity)
    except (OSError, StorageError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return capacity if capacity.machine == machine else None


def beyond(topology: Topology, capacity: Capacity | None, emulator: str = "auto") -> list[str]:
    """Sentences about what this machine was not measured to carry of a topology's links, under an *emulator*. Each link counts
    with the faster of its ways, one that follows a trace with its mean; one without a limit is left out."""
    if topology.kind != "namespaces":
        return []
    rates = dict(_rates(topology))
    together: dict[
        tuple[str | None, str | None], float
    ] = {}  # a cell carries what the fastest of its links does
    for link in topology.links:
        unit = (link.cell, None) if link.cell is not None else (None, link.name)
        together[unit] = max(together.get(unit, 0.0), rates.get(link.name, 0.0))
    total = sum(together.values())
    if capacity is None or emulator not in ("auto", capacity.emulator):
        if total <= UNKNOWN_ABOVE_BPS:
            return []
        return [
            f"links of {format_rate(total)} together: whether this machine carries that was not measured; "
            "`sudo testbed doctor --links` does"
        ]
    said = [
        f"link {name}: {format_rate(rate)} is more than one link was measured to carry on this machine "
        f"({_most(capacity.link_bps)})"
        for name, rate in rates.items()
        if rate > capacity.link_bps
    ]
    if len(rates) > 1 and total > max(capacity.sum_bps, *rates.values()):
        said.append(
            f"{len(rates)} links of {format_rate(total)} together: more than {LINKS} links were measured to carry at once on "
            f"this machine ({_most(capacity.sum_bps)}); where all are full they will not be what was asked for"
        )
    return said


def _most(bps: float) -> str:
    return format_rate(bps) if bps else f"less than {format_rate(RATES_BPS[0])}"


def _rates(topology: Topology) -> Iterator[tuple[str, float]]:
    for link in topology.links:
        try:
            rates = [direction.mean_rate_bps(way) for way, direction in link.profile.ways.items()]
        except TestbedError:  # a trace that cannot be read: whoever needs it says so
            continue
        if known := [rate for rate in rates if rate is not None]:
            yield link.name, max(known)
