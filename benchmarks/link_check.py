"""Asked beside measured: emulated links under several profiles, each calibrated as a run does it.

sudo python benchmarks/link_check.py [--emulator userspace|netem] [--json] [PROFILE ...]
"""

from __future__ import annotations

import argparse
import json
import sys

from testbed.errors import TestbedError
from testbed.net.calibrate import Calibration, calibrate
from testbed.net.fabric import Fabric
from testbed.net.profile import parse_profile
from testbed.net.topology import Link, Node, Topology

PROFILES = (
    "rate=1mbit,delay=10ms",
    "rate=10mbit,delay=50ms,loss=1%",
    "rate=50mbit,delay=20ms,jitter=2ms",
    "rate=100mbit,delay=10ms",
    "rate=100mbit,delay=10ms,loss=5%",
    "rate=200mbit,delay=1ms",
    "geo",
)


def measure(profiles: list[str], emulator: str) -> list[Calibration]:
    """One calibration a profile, all on one link."""
    wanted = [parse_profile(text) for text in profiles]
    topology = Topology("check", (Node("a"), Node("b")), (Link("link", "a", "b", wanted[0], None),))
    with Fabric.build(topology, emulator) as fabric:
        done = []
        for profile in wanted:
            fabric.apply("link", profile)
            done.append(calibrate(fabric, "link", profile))
        return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "profiles", nargs="*", metavar="PROFILE", help="presets or rate=…,delay=… (default: a selection)"
    )
    parser.add_argument("--emulator", default="auto", choices=("auto", "netem", "userspace"))
    parser.add_argument("--json", action="store_true", help="everything measured, as JSON")
    options = parser.parse_args()
    try:
        calibrations = measure(options.profiles or list(PROFILES), options.emulator)
    except TestbedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if options.json:
        print(json.dumps([calibration.to_dict() for calibration in calibrations], indent=1))
    else:
        for calibration in calibrations:
            attempts = len(calibration.attempts)
            print(
                f"{calibration.profile}  ({calibration.emulator}, attempts: {attempts}) {calibration.cause}"
            )
            for check, line in zip(calibration.checks, calibration.lines(), strict=True):
                p99 = f"  p99 {check.p99 * 1e3:.2f} ms" if check.p99 is not None else ""
                verdict = "ok" if line["ok"] else "OUT"
                print(
                    f"  {line['way']:5}{line['what']:6}{line['asked']:>12}{line['measured']:>12}{line['error']:>10}"
                    f"  n={check.n:<6}{verdict}{p99}"
                )
    return 0 if all(calibration.ok for calibration in calibrations) else 1


if __name__ == "__main__":
    sys.exit(main())
