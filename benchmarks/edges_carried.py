"""How many edges a machine carries faithfully: one edge's link is calibrated while a TCP flow from every other fills theirs.

    sudo .venv/bin/python -m benchmarks.edges_carried [--edges 2 4 8 16 32 64] [--rate 50] [--delay 5] [--json]

Of each number: whether the link stayed within tolerance, what was not, and how late the relay was with its packets at most.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from testbed.experiment import full_load
from testbed.experiment.plan import make_plan
from testbed.net.fabric.fabric import Fabric


def measured(edges: int, profile: str, emulator: str) -> dict[str, Any]:
    """What so many edges came to, each with a link of its own under that profile."""
    plan = make_plan(
        {
            "name": "benchmark",
            "topology": "star",
            "cloud": "hub",
            "edges": edges,
            "profiles": [profile],
            "model": "shape:llama-3.1-8b",
            "compute": {"edge": "device:m1-max-llama-3.1-8b", "cloud": "device:rtx-4090-llama-3.1-8b"},
            "load": "closed",
            "tasks": ["needle"],
        },
        "the benchmark's scenario",
    )
    with Fabric.build(plan.under(plan.profiles[0]), emulator) as fabric:
        found = full_load.measured(fabric, plan)
        assert found is not None
        late = max(each.worst_lateness_s for each in found.calibration.attempts[-1].counters.values())
    return {
        "edges": edges,
        "ok": found.ok,
        "others_bps": found.carried_bps,
        "late_s": late,
        "attempts": len(found.calibration.attempts),
        "cause": found.cause,
    }


def main() -> None:
    """Print a line a number of edges, up to the first that is not carried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edges", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rate", type=float, default=50.0, help="Mbit/s of each edge's link")
    parser.add_argument("--delay", type=float, default=5.0, help="one-way, in ms")
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    profile = f"rate={options.rate:g}mbit,delay={options.delay:g}ms"
    lines = []
    for edges in options.edges:
        lines.append(measured(edges, profile, options.emulator))
        if not options.json:
            print(json.dumps(lines[-1]))
        if not lines[-1]["ok"]:
            break
    if options.json:
        print(json.dumps({"profile": profile, "load": os.getloadavg()[0], "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
