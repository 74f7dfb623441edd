"""Many links at once: what they carry together, how late the emulator is on each, and whether one of them is still what it was
asked for while the others are full.

    sudo python -m benchmarks.many_links [--links 1 8 16 32 64] [--total 1gbit 2gbit 5gbit] [--emulator userspace] [--json]

The network is a star: leaves around a hub, each on a link of its own of ``--delay`` each way, whose rates add up to ``--total``.
*asked* and *carried* are TCP's payload, one CUBIC flow up each link at once (asked: rate x 1448/1500), over ``--seconds`` after a
second and a half; *least* is the share of what it was asked for that the slowest link had; *late* is the worst lateness of
each link, median and worst over the links. Then the first link is idle and calibrated, both ways, a quarter of a run's probes,
while the other links go on as before (with one link: nothing goes on): the worse way of each figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from typing import Any

from benchmarks.topology_scale import star
from testbed.errors import TestbedError
from testbed.net.calibration.calibrate import calibrate
from testbed.net.calibration.load import TCP_SHARE, loaded
from testbed.net.emulators.emulator import Wanted
from testbed.net.emulators.relay.userspace import spread
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile, parse_profile
from testbed.net.profile.trace import WAYS
from testbed.net.topology.topology import Topology
from testbed.units import format_rate, parse_rate

SETTLE_S = 1.5


def measure(links: int, total_bps: float, options: argparse.Namespace) -> dict[str, Any]:
    """One number of links that together have the rate."""
    profile = parse_profile(f"rate={total_bps / links:.0f}bit,delay={options.delay}")
    topology = star(links + 1, profile)
    row: dict[str, Any] = {"links": links, "total_bps": total_bps, "asked_bps": total_bps * TCP_SHARE}
    with Fabric.build(topology, options.emulator) as fabric:
        row["processes"] = relays(fabric.topology) if options.emulator == "userspace" else 0
        for link in topology.links:
            fabric.counters(link.name)  # what is recent begins anew
        with loaded(fabric, topology.links) as load:
            rates = list(load.rates_bps(SETTLE_S, options.seconds).values())
            late = [fabric.counters(link.name)["up"].recent_lateness_s for link in topology.links]
        row |= {"carried_bps": sum(rates), "least": min(rates) * links / row["asked_bps"]}
        row |= {"late_s": late, "late_median_s": statistics.median(late), "late_worst_s": max(late)}
        row["probed"] = probe(fabric, profile)
    return row


def relays(topology: Topology) -> int:
    """Processes that the links are spread over."""
    wanted = [Wanted(link.name, "", "", link.profile) for link in topology.links]
    return len(spread(wanted, len(os.sched_getaffinity(0))))


def probe(fabric: Fabric, profile: Profile) -> dict[str, Any]:
    """The first link, calibrated while the others are full."""
    first, *others = fabric.topology.links
    with loaded(fabric, others) if others else contextlib.nullcontext():
        found = calibrate(fabric, first.name, profile, quick=True, attempts=1)
    checks = {(check.way, check.what): check for check in found.checks}

    def worst(what: str, relative: bool) -> float | None:
        pairs = [checks[way, what] for way in WAYS]
        off = [(c.measured - c.asked) / (c.asked if relative else 1) for c in pairs if c.measured is not None]
        return max(off, key=abs) if len(off) == len(pairs) else None

    return {
        "ok": found.ok,
        "cause": found.cause,
        "rate_error": worst("rate", True),
        "delay_over_s": worst("delay", False),
        "loss": worst("loss", False),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    probed = row["probed"]

    def shown(value: float | None, scale: float, unit: str) -> str:
        return "-" if value is None else f"{scale * value:+.2f}{unit}"

    return (
        f"{row['links']:>5} {format_rate(row['total_bps']):>9} {row['processes']:>6} {row['asked_bps'] / 1e6:>8.0f} "
        f"{row['carried_bps'] / 1e6:>8.0f} {row['least']:>6.3f} {1e3 * row['late_median_s']:>9.2f} "
        f"{1e3 * row['late_worst_s']:>9.2f}   {shown(probed['rate_error'], 100, '%'):>8} "
        f"{shown(probed['delay_over_s'], 1e3, 'ms'):>9} {shown(probed['loss'], 100, '%'):>7}  "
        f"{'in tolerance' if probed['ok'] else probed['cause']}"
    )


HEADER = (
    f"{'links':>5} {'total':>9} {'relays':>6} {'asked':>8} {'carried':>8} {'least':>6} {'late: p50':>9} {'worst, ms':>9}   "
    f"{'rate':>8} {'p50 delay':>9} {'lost':>7}  one link under the others' load"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--links", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--total", nargs="+", default=["1gbit", "2gbit", "5gbit"], metavar="RATE")
    parser.add_argument("--delay", default="5ms", help="of each link, each way")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--emulator", default="userspace", choices=("netem", "userspace"))
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    options = parser.parse_args()
    rows = []
    table = sys.stderr if options.json else sys.stdout
    print(f"{options.emulator}, Mbit/s of payload", HEADER, sep="\n", file=table, flush=True)
    try:
        for total in options.total:
            for links in options.links:
                rows.append(measure(links, parse_rate(total), options))
                print(line(rows[-1]), file=table, flush=True)
    except TestbedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if options.json:
        print(json.dumps({"emulator": options.emulator, "delay": options.delay, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
