"""How TCP flows share a radio cell, by scheduler and number of edges, each sending up as fast as it goes.

    sudo .venv/bin/python -m benchmarks.cell [--edges 4 16] [--rate 40] [--repeats 5] [--seconds 4] [--json]

Of each: Jain's index of what the edges got (the least and the median of the repeats), what they came to together of the cell's
rate, and how late the relay was with their packets at most.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

from testbed.net.calibration.load import TCP_SHARE, loaded
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.files import topology_from

SCHEDULERS = ("equal", "proportional-fair", "tcp", "reserved")


def jain(rates: list[float]) -> float:
    """1: all the same; 1/n: one has it all."""
    return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates))


def shared(scheduler: str, edges: int, rate_mbit: float, seconds: float) -> tuple[float, float, float]:
    """Jain's index, the part of the rate that was used, the worst lateness (seconds)."""
    cell = topology_from(
        {
            "kind": "cell",
            "nodes": edges + 1,
            "profile": f"rate={rate_mbit:g}mbit,delay=5ms",
            "scheduler": scheduler,
        },
        "the benchmark's topology",
        "cell",
    )
    with Fabric.build(cell, "userspace") as fabric:
        with loaded(fabric, cell.links) as load:
            rates = list(load.rates_bps(1.5, seconds).values())
        late = max(
            each.worst_lateness_s for link in cell.links for each in fabric.counters(link.name).values()
        )
    return jain(rates), sum(rates) / (TCP_SHARE * rate_mbit * 1e6), late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rate", type=float, default=40.0, help="Mbit/s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for scheduler in SCHEDULERS:
        for edges in options.edges:
            runs = [shared(scheduler, edges, options.rate, options.seconds) for _ in range(options.repeats)]
            indices, used, late = zip(*runs, strict=True)
            found.append(
                {
                    "scheduler": scheduler,
                    "edges": edges,
                    "jain_least": min(indices),
                    "jain_median": median(indices),
                    "used": median(used),
                    "late_s": max(late),
                }
            )
            if not options.json:
                print(
                    f"{scheduler:<18} {edges:>3} edges  Jain {min(indices):.4f} (median {median(indices):.4f})  "
                    f"{median(used):.1%} of the rate  late by {max(late) * 1e3:.2f} ms",
                    flush=True,
                )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
