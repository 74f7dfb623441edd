"""Asked beside measured, cell by cell: rate, one-way delay and loss of emulated links, bursts, traces and TCP.

    sudo python -m benchmarks.link_fidelity [--emulator userspace|netem] [--quick] [--busy] [--only cells,bursts,traces,tcp]
                                            [--rates 1,10] [--delays 1,10] [--trace FILE] [--json] [PROFILE ...]
    python -m benchmarks.link_fidelity --merge FILE... [--json]

*cells*: each is one profile on one link, measured once as a run measures it, up and down, with 10,000 probes each way for
delay and loss. *bursts*: 200,000 probes each way through Gilbert-Elliott chains. *traces*: what is delivered along a sine
and along --trace. *tcp*: one flow's goodput on loss-free links, in the ten seconds after its start-up (a second and twenty
round trips). ``--busy`` keeps every core busy with a process of ordinary priority meanwhile. The whole takes forty minutes; it
can be had in parts, whose JSON ``--merge`` puts together again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.bulk_tcp import bulk, start_up_s
from benchmarks.fidelity_table import burst_errors, line, merge, report
from testbed.errors import SpecError, TestbedError
from testbed.net.calibration.calibrate import busy_cores, calibrate
from testbed.net.calibration.probes import WAYS, PacketTrain, Prober
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.loss import GilbertElliott
from testbed.net.profile.profile import Profile, parse_profile
from testbed.net.topology.topology import Link, Node, Topology

RATES = (1, 10, 50, 100, 500, 1000, 2000, 5000)  # Mbit/s
DELAYS = (1, 10, 50, 150)  # ms
LOSSES = (0, 1, 5)  # %
QUICK = (
    "rate=1mbit,delay=10ms",
    "rate=10mbit,delay=50ms,loss=1%",
    "rate=100mbit,delay=10ms",
    "rate=500mbit,delay=1ms",
)
BURSTS = tuple(f"rate=100mbit,delay=10ms,loss=gilbert({chain})" for chain in ("2%,burst=5", "5%,burst=4"))
SINE = "delay=20ms,sine:5mbit..30mbit*4s"
PARTS = ("cells", "bursts", "traces", "tcp")
PROBES, BURST_PROBES, PHASES = 10_000, 200_000, 4
TCP_S = 10.0
HEADERS = 1448 / 1500  # what TCP, with time stamps, and IP leave of a full packet


@contextlib.contextmanager
def network(profile: Profile, emulator: str, congestion: str | None = None) -> Iterator[Fabric]:
    """One link under the profile."""
    topology = Topology("fidelity", (Node("a"), Node("b")), (Link("link", "a", "b", profile, congestion),))
    with Fabric.build(topology, emulator) as fabric:
        yield fabric


def cell(text: str, emulator: str, probes: int) -> dict[str, Any]:
    """One cell, from a single attempt: the gate's second one would hide errors."""
    profile = parse_profile(text)
    with network(profile, emulator) as fabric:
        result = calibrate(fabric, "link", profile, probes=probes, attempts=1)
    row: dict[str, Any] = {"profile": str(profile), "rate_bps": profile.up.rate_bps, "cause": result.cause}
    checks = {(check.way, check.what): check for check in result.checks}
    for way in WAYS:
        rate, delay, loss = (checks[way, what] for what in ("rate", "delay", "loss"))
        row[way] = {
            "rate_bps": rate.measured,
            "rate_error": None if None in (rate.asked, rate.measured) else rate.measured / rate.asked - 1,
            "p50_over_s": None if delay.measured is None else delay.measured - delay.asked,
            "p99_over_s": None if delay.p99 is None else delay.p99 - delay.asked,
            "loss": loss.measured,
            "loss_asked": loss.asked,
            "loss_ok": loss.ok,
            "n": [rate.n, delay.n, loss.n],
            "worst_lateness_s": result.attempts[-1].counters[way].worst_lateness_s,
        }
    return row


def bursts(text: str, emulator: str, probes: int) -> dict[str, Any]:
    """Mean loss and mean burst length of numbered probes, both ways, in stretches that each begin anew."""
    profile = parse_profile(text)
    flow = PacketTrain(probes // PHASES, 44, 0.15e-3, 600.0, catch_up=True)
    with network(profile, emulator) as fabric, Prober(fabric, "link", "a", "b", urgent=True) as prober:
        arrived = [prober.run(dict.fromkeys(WAYS, flow), 0.3) for _ in range(PHASES)]
    model = profile.up.loss_model
    assert isinstance(model, GilbertElliott)
    row: dict[str, Any] = {"profile": text, "loss_asked": model.mean, "burst_asked": model.chain().burst}
    row["errors"] = burst_errors(model, probes)
    for way in WAYS:
        gaps: list[int] = []
        for phase in arrived:
            numbers = [-1, *sorted(phase[way].numbers), phase[way].sent]
            gaps += [b - a - 1 for a, b in pairwise(numbers) if b - a > 1]
        sent = sum(phase[way].sent for phase in arrived)
        row[way] = {
            "n": sent,
            "loss": sum(gaps) / sent,
            "bursts": len(gaps),
            "burst": sum(gaps) / max(1, len(gaps)),
        }
    return row


def trace(text: str, emulator: str, seconds: float) -> dict[str, Any]:
    """Correlation and sum of what was delivered in each tenth of a second."""
    profile = parse_profile(text)
    try:
        with network(profile, emulator) as fabric:
            result = calibrate(fabric, "link", profile, attempts=1, stretch_s=seconds)
    except SpecError as error:
        return {"profile": text, "refused": str(error)}
    row: dict[str, Any] = {"profile": text, "seconds": seconds}
    for curve in result.attempts[-1].curves:
        asked, delivered = curve.totals
        row[curve.way] = {
            "correlation": curve.correlation,
            "total_error": delivered / asked - 1,
            "n": len(curve.asked_bytes),
        }
    return row


def tcp(text: str, emulator: str, congestion: str) -> dict[str, Any]:
    """One flow up."""
    profile = parse_profile(text)
    rate = profile.up.rate_bps
    assert rate is not None
    possible, start = rate * HEADERS, start_up_s(profile.round_trip_s)
    with network(profile, emulator, congestion) as fabric:
        done = bulk(fabric, "a", "b", start + TCP_S + 1.0 + 5 * profile.round_trip_s)
        counted = fabric.counters("link")["up"]
    return {
        "profile": text,
        "rate_bps": rate,
        "start_up_s": start,
        "ramp_s": done.ramp_s(possible),
        "share": done.goodput_bps(start, TCP_S, possible) / possible,
        "congestion": done.congestion,
        "dropped": counted.dropped_queue,
        "lateness_s": counted.worst_lateness_s,
    }


def grid(options: argparse.Namespace, losses: tuple[int, ...]) -> list[str]:
    """The profiles of the cells, or of the TCP flows."""
    if options.profiles or options.quick:
        texts = options.profiles or list(QUICK)
        return [text for text in texts if losses != (0,) or not parse_profile(text).up.loss]
    pairs = [(r, d) for r in options.rates for d in options.delays]
    return [f"rate={r}mbit,delay={d}ms" + (f",loss={x}%" if x else "") for r, d in pairs for x in losses]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that was chosen; a line each, as it comes."""
    found: dict[str, Any] = {"emulator": options.emulator, "busy": options.busy}
    jobs = {
        "cells": [(cell, text, options.probes) for text in grid(options, LOSSES)],
        "bursts": [(bursts, text, options.burst_probes) for text in BURSTS],
        "traces": [(trace, text, options.seconds) for text in (SINE, *options.trace)],
        "tcp": [(tcp, text, options.congestion) for text in grid(options, (0,))],
    }
    with busy_cores(options.busy):
        for part in options.only:
            found[part] = []
            for function, text, *rest in jobs[part]:
                row = function(text, options.emulator, *rest)  # type: ignore[operator]
                found[part].append(row)
                print(line(part, row), file=sys.stderr if options.json else sys.stdout, flush=True)
    return found


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def parts(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(PARTS):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: use some of {', '.join(PARTS)}")
        return chosen

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("profiles", nargs="*", metavar="PROFILE", help="instead of the grid")
    add("--emulator", default="userspace", choices=("netem", "userspace"))
    add("--quick", action="store_true", help="four cells of the grid, and no more unless --only asks for it")
    add("--busy", action="store_true", help="with every core kept busy")
    add("--only", type=parts, metavar="PART,...", help=f"some of {', '.join(PARTS)}")
    add("--rates", type=numbers, default=list(RATES), help="only these, in Mbit/s, separated by commas")
    add("--delays", type=numbers, default=list(DELAYS), help="only these, in milliseconds")
    add("--probes", type=int, default=PROBES, help="of a cell, each way")
    add("--burst-probes", type=int, default=BURST_PROBES)
    add(
        "--trace",
        action="append",
        default=[],
        metavar="PROFILE",
        help="one more, such as delay=20ms,trace:FILE",
    )
    add("--congestion", default="cubic", help="TCP's; BBR pauses by itself every ten seconds")
    add("--seconds", type=float, default=20.0, help="of each trace")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="the table of what earlier runs' --json said")
    add("--json", action="store_true")
    options = parser.parse_args()
    options.only = options.only or (["cells"] if options.quick or options.profiles else list(PARTS))
    return options


def main() -> int:
    options = arguments()
    try:
        earlier = [json.loads(path.read_text()) for path in options.merge or ()]
        found = merge(earlier) if earlier else [measure(options)]
    except TestbedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except (OSError, ValueError) as error:
        print(f"--merge: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print(*map(report, found), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
