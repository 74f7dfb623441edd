"""Do the two emulators agree? The same TCP transfers across the same links, through both in turn.

    sudo python -m benchmarks.emulators_agree [--only 1,2,...] [--transfers 5] [--seed 1] [--json]
    python -m benchmarks.emulators_agree --merge FILE... [--json]

Ten profiles, five transfers of 1-20 MB (sizes by the seed) on each, fifty in all. Two networks stand side by side, one for each
emulator; a size crosses both, one after the other, and the order changes from size to size. A time runs from the connection's
first byte to its last byte's arrival. To agree: the median ratio of times within 3 %, on each profile and over all.

``--only`` takes a part of the profiles, by number; ``--merge`` puts together what several runs' ``--json`` said. Needs a
kernel with netem.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from testbed.errors import TestbedError
from testbed.hosts.namespaces import call_inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile, parse_profile
from testbed.net.topology.topology import Link, Node, Topology

PROFILES = (
    "rate=10mbit,delay=10ms",
    "rate=20mbit,delay=1ms",
    "rate=20mbit,delay=50ms",
    "rate=30mbit,delay=20ms,queue=100ms",
    "rate=40mbit,delay=10ms",
    "rate=50mbit,delay=30ms",
    "up:rate=12mbit,delay=30ms;down:rate=40mbit,delay=10ms",
    "rate=25mbit,delay=20ms,jitter=2ms,queue=200ms",
    "rate=15mbit,delay=15ms,overhead=24b,mtu=1400",
    "delay=20ms,sine:10mbit..30mbit*2s",
)
"""Each as fast as both emulators can be in a guest kernel with one processor; all without loss, whose dice would decide."""
EMULATORS = ("netem", "userspace")
MEGABYTE, LEAST_MB, MOST_MB = 1_000_000, 1, 20
TOLERANCE = 0.03
_CHUNK, _PATIENCE_S = 1 << 18, 120.0


def sizes(number: int, transfers: int, seed: int) -> list[int]:
    """Bytes of a profile's transfers, the same for whoever asks."""
    chance = random.Random(f"{seed}/{number}")
    return [round(chance.uniform(LEAST_MB, MOST_MB) * MEGABYTE) for _ in range(transfers)]


def transfer(fabric: Fabric, size: int) -> float:
    """Seconds that so many bytes take from a to b, on a connection of their own."""
    listener = call_inside(fabric.namespace("b"), partial(_listen, fabric.address("b")))
    sender = call_inside(fabric.namespace("a"), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    arrived: list[float] = []

    def receive(sock: socket.socket) -> None:
        buffer, left = bytearray(_CHUNK), size
        while left and (got := sock.recv_into(buffer)):
            left -= got
        if not left:
            arrived.append(time.monotonic())

    with listener, sender:
        sender.settimeout(_PATIENCE_S)
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        with receiver:
            receiver.settimeout(_PATIENCE_S)
            receiving = threading.Thread(target=receive, args=(receiver,))
            receiving.start()
            begun, data = time.monotonic(), bytes(_CHUNK)
            for place in range(0, size, _CHUNK):
                sender.sendall(data[: min(_CHUNK, size - place)])
            receiving.join()
    if not arrived:
        raise TestbedError("a transfer did not arrive")
    return arrived[0] - begun


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1)
    return listener


def compare(number: int, transfers: int, seed: int) -> dict[str, Any]:
    """One profile: what each transfer took through each emulator, and what the emulators counted."""
    profile = parse_profile(PROFILES[number])
    seconds: dict[str, list[float]] = {name: [] for name in EMULATORS}
    with contextlib.ExitStack() as networks:
        fabrics = {name: networks.enter_context(_network(profile, name)) for name in EMULATORS}
        asked = sizes(number, transfers, seed)
        for place, size in enumerate(asked):
            for name in EMULATORS if place % 2 else reversed(EMULATORS):
                if profile.changes:
                    fabrics[name].apply("link", profile)  # its trace begins with the transfer
                seconds[name].append(transfer(fabrics[name], size))
        counted = {name: fabrics[name].counters("link")["up"].record() for name in EMULATORS}
    ratios = [u / n for n, u in zip(seconds["netem"], seconds["userspace"], strict=True)]
    return {
        "number": number + 1,
        "profile": PROFILES[number],
        "bytes": asked,
        "seconds": seconds,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "counters": counted,
    }


def _network(profile: Profile, emulator: str) -> Fabric:
    topology = Topology("agree", (Node("a"), Node("b")), (Link("link", "a", "b", profile, "cubic"),))
    return Fabric.build(topology, emulator)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All profiles' rows, the median of all ratios, and whether each median is within the tolerance."""
    ratios = [ratio for row in rows for ratio in row["ratios"]]
    overall = statistics.median(ratios) if ratios else None
    medians = [row["median_ratio"] for row in rows] + ([overall] if overall else [])
    return {
        "profiles": sorted(rows, key=lambda row: row["number"]),
        "transfers": len(ratios),
        "median_ratio": overall,
        "agree": all(abs(median - 1) <= TOLERANCE for median in medians),
    }


def line(row: dict[str, Any]) -> str:
    """A profile for people."""
    medians = [statistics.median(row["seconds"][name]) for name in EMULATORS]
    spread = f"{min(row['ratios']):.3f}..{max(row['ratios']):.3f}"
    return (
        f"{row['number']:>3} {row['profile']:56} {medians[0]:8.3f} {medians[1]:9.3f} {row['median_ratio']:8.4f} "
        f" {spread}  {len(row['ratios'])}"
    )


def merge(paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of several runs; a profile measured twice counts as it was last."""
    rows: dict[int, dict[str, Any]] = {}
    for path in paths:
        for row in json.loads(path.read_text())["profiles"]:
            rows[row["number"]] = row
    return list(rows.values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    everything = range(1, len(PROFILES) + 1)

    def numbers(text: str) -> list[int]:
        chosen = [int(number) for number in text.split(",")]
        if not set(chosen) <= set(everything):
            raise argparse.ArgumentTypeError(f"profiles have the numbers 1 to {len(PROFILES)}")
        return chosen

    parser.add_argument("--only", type=numbers, default=list(everything), help="profiles, by number")
    parser.add_argument("--transfers", type=int, default=5, help="on each profile (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the sizes")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="of what earlier --json said")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    out = sys.stderr if options.json else sys.stdout
    print(f"    {'profile':56} {'netem s':>8} {'userspace':>9} {'ratio':>8}  spread         n", file=out)
    rows = []
    try:
        for row in (
            merge(options.merge)
            if options.merge
            else (compare(number - 1, options.transfers, options.seed) for number in options.only)
        ):
            rows.append(row)
            print(line(row), file=out, flush=True)
    except TestbedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--merge: {error}", file=sys.stderr)
        return 2
    found = summary(rows)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        verdict = "agree" if found["agree"] else "do not agree"
        print(
            f"\nmedian of {found['transfers']} ratios (userspace / netem): {found['median_ratio']:.4f}: they {verdict}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
