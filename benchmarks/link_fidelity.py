"""Asked beside measured, cell by cell: rate, one-way delay and loss of emulated links, both ways.

    sudo python benchmarks/link_fidelity.py [--emulator userspace|netem] [--quick] [--busy] [--rates 1,10] [--json] [PROFILE ...]

Each cell is one profile on one link, calibrated once as a run does it, up and down. ``--busy`` keeps every core busy with a
process of ordinary priority meanwhile. ``--tcp SECONDS`` adds one TCP flow's goodput (iperf3, after two seconds of start-up) on
loss-free links. A Gilbert-Elliott row walks 20,000 probes through bursts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from testbed.errors import TestbedError
from testbed.net import calibrate
from testbed.net.fabric import Fabric
from testbed.net.probing import Flow, Prober
from testbed.net.profile import Profile, parse_profile
from testbed.net.topology import Link, Node, Topology

RATES = (1, 10, 50, 100, 500, 1000)  # Mbit/s
DELAYS = (1, 10, 50, 150)  # ms
LOSSES = (0, 1, 5)  # %
QUICK = (
    "rate=1mbit,delay=10ms",
    "rate=10mbit,delay=50ms,loss=1%",
    "rate=100mbit,delay=10ms",
    "rate=500mbit,delay=1ms",
)
BURSTS = "rate=100mbit,delay=10ms,loss=gilbert(2%,burst=5)"


@contextlib.contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """A busy process for each core, where wanted."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)] if wanted else []
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def network(profile: Profile, emulator: str) -> Iterator[Fabric]:
    """One link under the profile."""
    topology = Topology("fidelity", (Node("a"), Node("b")), (Link("link", "a", "b", profile, None),))
    with Fabric.build(topology, emulator) as fabric:
        yield fabric


def measure(profile: Profile, emulator: str, tcp_s: int) -> dict[str, Any]:
    """One cell: the worst of both ways, from a single attempt (the gate's second one would hide errors)."""
    calibrate.ATTEMPTS = 1
    with network(profile, emulator) as fabric:
        result = calibrate.calibrate(fabric, "link", profile)
        row: dict[str, Any] = {"profile": str(profile), "emulator": fabric.emulator.name, "ok": result.ok}
        checks = {(check.way, check.what): check for check in result.checks}
        for way in ("up", "down"):
            rate, delay, loss = (checks[way, what] for what in ("rate", "delay", "loss"))
            row[way] = {
                "rate_error": None if None in (rate.asked, rate.measured) else rate.measured / rate.asked - 1,
                "p50_over_s": None if delay.measured is None else delay.measured - delay.asked,
                "p99_over_s": None if delay.p99 is None else delay.p99 - delay.asked,
                "loss": loss.measured,
                "loss_asked": loss.asked,
                "loss_ok": loss.ok,
                "n": [rate.n, delay.n, loss.n],
            }
        row["cause"] = result.cause
        if tcp_s and not profile.up.loss and profile.up.rate_bps:
            row["goodput"] = goodput(fabric, tcp_s) / (profile.up.rate_bps * 1448 / 1500)
    return row


def goodput(fabric: Fabric, seconds: int) -> float:
    """Bits per second of payload that one TCP flow carries up."""
    inside = ["ip", "netns", "exec"]
    server = subprocess.Popen(
        [*inside, fabric.namespace("b"), "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL
    )
    time.sleep(0.3)
    command = [
        *inside,
        fabric.namespace("a"),
        "iperf3",
        "-c",
        fabric.address("b"),
        "-t",
        str(seconds),
        "-O",
        "2",
        "-J",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    finally:
        server.terminate()
        server.wait()
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"])


def bursts(emulator: str) -> dict[str, Any]:
    """Mean loss and mean burst length of what 20,000 numbered probes up lost."""
    profile = parse_profile(BURSTS)
    flow = Flow(20_000, 64, 0.4e-3, 30.0, catch_up=True)
    with network(profile, emulator) as fabric, Prober(fabric, "link", "a", "b", urgent=True) as prober:
        arrived = prober.run({"up": flow}, 0.3)["up"]
    numbers = [-1, *sorted(arrived.numbers), arrived.sent]
    gaps = [b - a - 1 for a, b in pairwise(numbers) if b - a > 1]
    model = profile.up.loss_model
    assert model is not None
    return {
        "profile": BURSTS,
        "n": arrived.sent,
        "loss": sum(gaps) / arrived.sent,
        "loss_asked": model.mean,
        "burst": sum(gaps) / max(1, len(gaps)),
        "burst_asked": getattr(model, "burst", None),
    }


def line(row: dict[str, Any]) -> str:
    """A row for people: the worse way of each figure."""
    ways = [row["up"], row["down"]]

    def worst(key: str, scale: float) -> str:
        values = [way[key] for way in ways if way[key] is not None]
        return f"{max(values, key=abs) * scale:+.3f}" if values else "-"

    losses = " / ".join("-" if w["loss"] is None else f"{100 * w['loss']:.2f}%" for w in ways)
    tcp = f"  tcp {row['goodput']:.4f}" if "goodput" in row else ""
    return (
        f"{row['profile']:42} rate {worst('rate_error', 100):>8}%  p50 {worst('p50_over_s', 1e3):>8} ms"
        f"  p99 {worst('p99_over_s', 1e3):>8} ms  loss {losses}{tcp}  {'ok' if row['ok'] else row['cause']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="instead of the grid")
    parser.add_argument("--emulator", default="auto", choices=("auto", "netem", "userspace"))
    parser.add_argument("--quick", action="store_true", help="four cells of the grid")
    parser.add_argument("--busy", action="store_true", help="with every core kept busy")
    parser.add_argument("--rates", help="only these, in Mbit/s, separated by commas")
    parser.add_argument("--tcp", type=int, default=0, metavar="SECONDS", help="one TCP flow's goodput, too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates = [int(rate) for rate in options.rates.split(",")] if options.rates else RATES
    grid = [
        f"rate={r}mbit,delay={d}ms" + (f",loss={x}%" if x else "")
        for r in rates
        for d in DELAYS
        for x in LOSSES
    ]
    texts = options.profiles or (QUICK if options.quick else grid)
    rows = []
    try:
        with busy_cores(options.busy):
            for text in texts:
                rows.append(measure(parse_profile(text), options.emulator, options.tcp))
                print(line(rows[-1]), file=sys.stderr if options.json else sys.stdout, flush=True)
            burst = bursts(options.emulator)
    except TestbedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    worst = {
        key: max(
            (abs(row[way][key]) for row in rows for way in ("up", "down") if row[way][key] is not None),
            default=None,
        )
        for key in ("rate_error", "p50_over_s", "p99_over_s")
    }
    if options.json:
        print(json.dumps({"busy": options.busy, "cells": rows, "worst": worst, "bursts": burst}, indent=1))
        return 0
    print(
        "worst of each:",
        {key: None if value is None else float(f"{value:.4g}") for key, value in worst.items()},
    )
    print(
        f"{BURSTS}: loss {burst['loss']:.4f} of {burst['loss_asked']:.4f}, burst {burst['burst']:.2f} of "
        f"{burst['burst_asked']:.2f} packets, n={burst['n']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
