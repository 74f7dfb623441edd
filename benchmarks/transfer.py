"""How long a payload takes across a link, by this project's transport and by iperf3, in turn on the same link.

sudo .venv/bin/python -m benchmarks.transfer [--profile rate=100mbit,delay=10ms]
        [--size 10mb] [--pairs 5] [--emulator auto] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from testbed.deadline import Deadline
from testbed.hosts.namespaces import inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.files import load_topology
from testbed.transport import wire
from testbed.transport.tcp import Tcp
from testbed.units import parse_size


def ours(fabric: Fabric, payload: bytes, congestion: str | None) -> float:
    """Seconds from the first byte handed to the socket to the last byte received."""
    with inside(fabric.namespace("cloud")):
        listener = Tcp().listen(congestion=congestion)
    arrived: list[float] = []

    def serve() -> None:
        connection = listener.accept()
        request = connection.receive_request(len(payload), Deadline(60.0), 60.0)
        if request is not None:
            arrived.append(request.at)
        connection.close()

    server = threading.Thread(target=serve)
    server.start()
    with inside(fabric.namespace("edge")):
        connection = Tcp().connect(fabric.address("cloud"), listener.port, congestion, 60.0)
    request = wire.Request(1, "split", "fp16", "", "Q?", "\n", 1)
    started = connection.send_request(request, [payload], checked=False)
    server.join()
    connection.close()
    listener.close()
    return arrived[0] - started


def iperf3(fabric: Fabric, size: int, congestion: str | None) -> float:
    """Seconds that iperf3's receiver took for as many bytes: its goodput over the bytes sent."""
    enter = ["nsenter", f"--net=/run/netns/{fabric.namespace('cloud')}", "--"]
    server = subprocess.Popen([*enter, "iperf3", "-s", "-1", "-J"], stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    enter = ["nsenter", f"--net=/run/netns/{fabric.namespace('edge')}", "--"]
    client = [*enter, "iperf3", "-c", fabric.address("cloud"), "-n", str(size), "-l", "128K", "-J"]
    if congestion:
        client += ["-C", congestion]
    subprocess.run(client, check=True, capture_output=True)
    told = json.loads(server.communicate(timeout=60)[0])["end"]["sum_received"]
    return size * 8 / told["bits_per_second"]


def main() -> int:
    """Print each pair and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", default="rate=100mbit,delay=10ms")
    parser.add_argument("--size", default="10mb")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    size = parse_size(arguments.size)
    payload = os.urandom(size)
    topology = load_topology("edge-cloud")
    link = topology.links[0]
    pairs = []
    with Fabric.build(
        topology.with_profiles({link.name: parse_profile(arguments.profile)}), arguments.emulator
    ) as fabric:
        emulator = fabric.emulator.name
        for _ in range(arguments.pairs):
            pairs.append((ours(fabric, payload, None), iperf3(fabric, size, None)))
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    value: dict[str, Any] = {
        "profile": arguments.profile,
        "emulator": emulator,
        "bytes": size,
        "pairs": pairs,
        "ours_s": medians[0],
        "iperf3_s": medians[1],
        "ratio": medians[0] / medians[1],
    }
    if arguments.json:
        print(json.dumps(value, indent=2))
    else:
        print(f"{size} bytes over {arguments.profile} ({emulator})\n   ours s  iperf3 s   ratio")
        for mine, theirs in pairs:
            print(f"{mine:9.3f} {theirs:9.3f} {mine / theirs:7.3f}")
        print(f"{medians[0]:9.3f} {medians[1]:9.3f} {value['ratio']:7.3f}   medians")
    return 0


if __name__ == "__main__":
    sys.exit(main())
