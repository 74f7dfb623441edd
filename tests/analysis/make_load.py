"""Writes a run directory of loads whose answers are known: Poisson arrivals at one link that takes each request as long (M/D/1).

Each codec's time on the link is fixed, so waits follow Lindley's recursion, and their distribution is Erlang's. Beside them
closed loops, in which a client has an answer a think time and a service later while nobody else asks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.analysis.make_run import lines, make_run, rewrite, write_manifest

#: codec -> seconds on the link
SERVICE = {"fp16": 1.0, "int4": 0.25}
RATES = (0.2, 0.5, 0.8, 1.5, 3.0)
CLOSED = (1, 4, 8)
THINK_S = 3.0
WARMUP_S, LASTS_S = 50.0, 400.0
Floats = npt.NDArray[np.float64]


def wait_below(t: float, rate: float, service: float) -> float:
    """P(wait <= t) of M/D/1 (A. K. Erlang, 1909; D. Gross and C. M. Harris, Fundamentals of Queueing Theory, section 5.1)."""
    steps = (rate * (t - k * service) for k in range(math.floor(t / service) + 1))
    terms = [(-x) ** k / math.factorial(k) * math.exp(x) for k, x in enumerate(steps)]
    return (1 - rate * service) * math.fsum(terms)


def wait_quantile(q: float, rate: float, service: float) -> float:
    """Where that reaches `q`, by bisection."""
    low, high = 0.0, 20 * service
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if wait_below(middle, rate, service) < q else (low, middle)
    return high


def arrivals(rng: np.random.Generator, rate: float, until_s: float) -> Floats:
    """A Poisson process."""
    times = np.cumsum(rng.exponential(1 / rate, int(rate * until_s * 2) + 50))
    return times[times < until_s]


def waits(arrived: Floats, service: float) -> Floats:
    """Of each request before its turn, in order of arrival (D. V. Lindley, 1952)."""
    found, free = [], 0.0
    for at in arrived:
        found.append(max(0.0, free - at))
        free = max(free, at) + service
    return np.array(found)


def closed(clients: int, service: float, until_s: float) -> tuple[Floats, Floats, list[int]]:
    """When clients that think for `THINK_S` ask, what each request waits, and whose it is."""
    next_at = [THINK_S * i / clients for i in range(clients)]
    arrived, waited, whose, free = [], [], [], 0.0
    while (at := min(next_at)) < until_s:
        client = next_at.index(at)
        begins = max(free, at)
        free = begins + service
        next_at[client] = free + THINK_S
        arrived.append(at), waited.append(begins - at), whose.append(client)
    return np.array(arrived), np.array(waited), whose


def make_load(path: Path, seed: int = 0, refused_every: int = 0) -> Path:
    """Every codec under every rate, and in closed loops; of each `refused_every`-th request (0: none) the cloud has no room."""
    make_run(path, ("5g-mid",), tuple(SERVICE), ("split",), ("needle",), examples=1)
    templates = {row["codec"]: row for row in lines(path)}
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for codec, service in SERVICE.items():
        for rate in RATES:
            at = arrivals(rng, rate, WARMUP_S + LASTS_S)
            whose = [int(i) for i in rng.integers(0, 4, len(at))]
            load = f"poisson(rate={rate:g}/s)"
            rows += _rows(templates[codec], load, service, at, waits(at, service), whose, refused_every)
        for clients in CLOSED:
            load = f"closed(clients={clients}, think=3s)"
            loop = closed(clients, service, WARMUP_S + LASTS_S)
            rows += _rows(templates[codec], load, service, *loop, refused_every)
    rewrite(path, rows)
    write_manifest(path, settings={"name": "loads", "warmup": f"{WARMUP_S:g}s", "duration": f"{LASTS_S:g}s"})
    return path


def _rows(
    template: dict[str, Any],
    load: str,
    service: float,
    at: Floats,
    wait: Floats,
    whose: list[int],
    every: int,
) -> list[dict[str, Any]]:
    rows = []
    zero = {name: 0.0 for name in template if name.endswith("_s") and isinstance(template[name], float)}
    for i in range(len(at)):
        about = {
            "load": load,
            "client": f"n{whose[i] + 1}",
            "arrived_at": float(at[i]),
            "warmup": bool(at[i] < WARMUP_S),
        }
        about |= {
            "trial": f"{load}/{template['codec']}/{i}",
            "cell": f"{load}/{template['codec']}",
            "replayed": True,
        }
        took = float(wait[i]) + service
        times = zero | {"link_queue_s": float(wait[i]), "transmit_s": service, "ttft_s": took, "e2e_s": took}
        row = (
            template
            | about
            | times
            | {"reused": "", "deadline_s": None, "amortized_s": None, "generate_s": 0.0}
        )
        if every and i % every == every - 1:
            row |= dict.fromkeys(times) | {"refused": True, "error": "no room"}
        rows.append(row)
    return rows


if __name__ == "__main__":
    import sys

    print(json.dumps(str(make_load(Path(sys.argv[1])))))
