"""Waits of a run of loads beside queueing theory's: Poisson arrivals at a server, and at a link, that take as long for each.

    sudo .venv/bin/python -m benchmarks.queueing [--seconds 120] [--loads 0.3 0.5 0.7] [--where server link] [--json]

That is M/D/1. At the server: eight edges, each with a fast link of its own, ask a cloud that answers one request at a time. At
the link: one edge's. Printed are the mean wait with its interval (Student's, over ten stretches of time), and that of Pollaczek
and Khinchine, load x service / 2 (1 - load), at the load and the service that the run had. A link's wait is what crossing it took
longer than the fastest request's; its service, the payload with its packets' headers over the rate. At the server: `queue_s`, and
what the cloud does for one request. Beside it the mean of Lindley's recursion over the very moments at which these requests came:
what is left between both is the testbed's, without chance.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scipy import stats as scipy_stats

from benchmarks.runs import rows
from testbed.experiment.row import STAGES

_SHARE = 1448 / 1500  # of a packet, what is TCP's data
_STRETCHES = 10
_WARMUP_S = 5.0
#: Edges, the rate of each one's link in Mbit/s, and tokens of the context: which of both is full.
_WHERE = {"server": (8, 100, 16), "link": (1, 40, 16)}
_LINK, _CLOUD = ("link_queue_s", "connect_s", "transmit_s"), ("decode_s", "first_token_s", "generate_s")


def asked(where: str, load: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of a run that asks so."""
    edges, rate, tokens = _WHERE[where]
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as folder:
        topology = Path(folder) / "topology.yaml"
        topology.write_text(
            f"{{kind: star, nodes: 3, profile: 'rate={rate}mbit,delay=1ms', congestion: cubic}}"
        )
        found = rows(
            topology=str(topology),
            cloud="hub",
            edges=edges,
            profiles=[f"rate={rate}mbit,delay=1ms"],
            model="shape:llama-3.1-8b",
            compute={"edge": "device:m1-max-llama-3.1-8b", "cloud": "device:rtx-4090-llama-3.1-8b"},
            placements=["store"],
            codecs=["int4"],
            tasks=["needle"],
            context_tokens=tokens,
            examples=1,
            max_new_tokens=4 if where == "server" else 1,
            load=load,
            duration=f"{seconds:g}s",
            warmup=f"{_WARMUP_S:g}s",
        )
    return [row for row in found if not row["warmup"]]


def service_s(where: str, found: Sequence[dict[str, Any]]) -> float:
    """What one request takes of what is full."""
    if where == "link":
        return float(8 * fmean(row["payload_bytes"] for row in found) / (found[0]["rate_up_bps"] * _SHARE))
    return float(median(sum(row[stage] for stage in _CLOUD) - row["delay_down_s"] for row in found))


def lindley(where: str, found: Sequence[dict[str, Any]], service: float) -> float:
    """The mean wait of one after the other, as they came, each of which takes so long (D. V. Lindley, 1952)."""
    before = {"server": STAGES[: STAGES.index("queue_s")], "link": STAGES[: STAGES.index("link_queue_s")]}[
        where
    ]
    came = sorted(row["arrived_at"] + sum(row[stage] for stage in before) for row in found)
    waits, free = [], 0.0
    for at in came:
        waits.append(max(0.0, free - at))
        free = max(free, at) + service
    return fmean(waits)


def waited(where: str, found: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(when it came up, how long it waited) of each request."""
    if where == "server":
        return [(row["arrived_at"], row["queue_s"]) for row in found]
    crossing = [(row["arrived_at"], sum(row[stage] for stage in _LINK)) for row in found]
    least = min(took for _, took in crossing)
    return [(at, took - least) for at, took in crossing]


def mean(waits: Sequence[tuple[float, float]], seconds: float) -> tuple[float, float, float]:
    """The mean wait, and its interval over stretches of time."""
    part = seconds / _STRETCHES
    stretches: list[list[float]] = [[] for _ in range(_STRETCHES)]
    for at, wait in waits:
        stretches[min(_STRETCHES - 1, max(0, int((at - _WARMUP_S) / part)))].append(wait)
    means = [fmean(own) for own in stretches if own]
    half = scipy_stats.t.ppf(0.975, len(means) - 1) * stdev(means) / math.sqrt(len(means))
    value = fmean(wait for _, wait in waits)
    return value, float(value - half), float(value + half)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--where", nargs="+", choices=_WHERE, default=list(_WHERE))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = []
    for where in options.where:
        alone = service_s(where, asked(where, "poisson(rate=1/s)", 10.0))
        for asked_load in options.loads:
            rate = asked_load / alone
            found = asked(where, f"poisson(rate={rate:.3f}/s)", options.seconds)
            wait, low, high = mean(waited(where, found), options.seconds)
            service = service_s(where, found)  # its own: what is replayed was measured anew
            load = rate * service
            theory = load * service / (2 * (1 - load))
            about = {"where": where, "load": load, "n": len(found), "service_s": service, "theory_s": theory}
            about |= {"lindley_s": lindley(where, found, service)}
            late = sum(bool(row["warnings"]) for row in found)
            lines.append({**about, "wait_s": wait, "low_s": low, "high_s": high, "not_kept_up": late})
            lines[-1]["within"] = bool(low <= theory <= high)
            if not options.json:
                print(json.dumps(lines[-1]))
    if options.json:
        print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
