"""How soon a cache is usable over a link that loses packets: by datagrams with repair, by streams, by the kernel's TCP.

sudo .venv/bin/python -m benchmarks.datagram_loss [--loss 0,1,2,5] [--rtt 20,50,100] [--rate 50mbit] [--size 1mb]
        [--chunk 64kb] [--repeats 5] [--transport 'datagram(fec=0.05)' …] [--congestion bbr] [--json]

A payload crosses in chunks, on a connection of its own each time; the transports take turns. *usable*: from the first byte handed
over until nothing more comes, in the median; *ratio*: to the first transport's; *chunks*: the share that came.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from testbed.deadline import Deadline
from testbed.hosts.namespaces import inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from testbed.transport import wire
from testbed.transport.transport import Transport, parse
from testbed.units import parse_size

TRANSPORTS = ("tcp", "quic", "datagram(fec=0.02)", "datagram(fec=0.05)")
_LONGEST_S = 120.0


@dataclass
class Crossing:
    """One payload's. usable_s: until nothing more came; came: of its chunks."""

    connect_s: float
    usable_s: float
    came: int
    wire_bytes: int


def crossing(fabric: Fabric | None, transport: Transport, chunks: list[bytes]) -> Crossing:
    """Send the chunks from one node to the other; None: over loopback."""
    with inside(fabric.namespace("cloud")) if fabric else nullcontext():
        listener = transport.listen()
    came, ended = 0, 0.0

    def serve() -> None:
        nonlocal came, ended
        stream = listener.accept()
        begun = stream.receive_request(Deadline(_LONGEST_S), _LONGEST_S)
        assert begun is not None
        for frame in stream.receive_context(begun[0], sum(map(len, chunks)), begun[1]):
            came += isinstance(frame.header, wire.Chunk)
            ended = frame.at
        stream.send(wire.Enough(1))
        stream.finish()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    with inside(fabric.namespace("edge")) if fabric else nullcontext():
        began = time.monotonic()
        stream = transport.connect(fabric.address("cloud") if fabric else "127.0.0.1", listener.port)
    deadline = Deadline(_LONGEST_S)
    started = stream.send(wire.Request(1, "split", "int8", "", "Q?", "\n", 1), deadline=deadline)
    for index, chunk in enumerate(chunks):
        stream.send_chunk(wire.Chunk(1, index, False, None), chunk, deadline)
    stream.send(wire.End(1, len(chunks), sum(map(len, chunks))), deadline=deadline)
    stream.receive(0, deadline)  # in which what is missing may be asked for
    server.join()
    stream.finish()
    listener.close()
    return Crossing(started - began, ended - started, came, stream.stats().sent)


def measured(options: argparse.Namespace, loss: str, rtt: str) -> list[dict[str, Any]]:
    """A line for each transport on one link."""
    delay = float(rtt) / 2
    profile = parse_profile(
        f"rate={options.rate},delay={delay:g}ms" + (f",loss={loss}%" if loss != "0" else "")
    )
    link = Link("link", "edge", "cloud", profile, options.congestion)
    size, chunk = parse_size(options.size), parse_size(options.chunk)
    payload = os.urandom(size)
    chunks = [payload[i : i + chunk] for i in range(0, size, chunk)]
    done: dict[str, list[Crossing]] = {text: [] for text in options.transport}
    with Fabric.build(Topology("loss", (Node("edge"), Node("cloud")), (link,)), options.emulator) as fabric:
        for _ in range(options.repeats):
            for text in options.transport:
                done[text].append(crossing(fabric, parse(text), chunks))
                fabric.settle("link")
    lines = []
    for text, crossings in done.items():
        usable = [c.usable_s for c in crossings]
        first = statistics.median(c.usable_s for c in done[options.transport[0]])
        lines.append(
            {
                "loss_percent": float(loss),
                "rtt_ms": float(rtt),
                "transport": text,
                "usable_s": statistics.median(usable),
                "each_s": usable,
                "connect_s": statistics.median(c.connect_s for c in crossings),
                "ratio": statistics.median(usable) / first,
                "chunks": sum(c.came for c in crossings) / len(crossings) / len(chunks),
                "wire_bytes": statistics.median(c.wire_bytes for c in crossings),
            }
        )
    return lines


def main() -> int:
    """Print a line for each link and transport."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loss", default="0,1,2,5", help="percent, each way")
    parser.add_argument("--rtt", default="20,50,100", help="ms")
    parser.add_argument("--rate", default="50mbit")
    parser.add_argument("--size", default="1mb")
    parser.add_argument("--chunk", default="64kb")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--transport", nargs="+", default=TRANSPORTS)
    parser.add_argument("--congestion", default="cubic", help="the kernel's, for TCP that names none")
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    if not options.json:
        print(
            f"{options.size} in chunks of {options.chunk} over {options.rate}, TCP under {options.congestion}"
        )
        print(" loss  RTT ms  transport                  usable s  ratio  chunks  wire MB")
    for rtt in options.rtt.split(","):
        for loss in options.loss.split(","):
            for line in measured(options, loss, rtt):
                lines.append(line)
                if not options.json:
                    print(
                        f"{line['loss_percent']:4g}% {line['rtt_ms']:6g}  {line['transport']:<26} {line['usable_s']:8.3f} "
                        f"{line['ratio']:6.2f} {line['chunks']:7.1%} {line['wire_bytes'] / 1e6:8.2f}",
                        flush=True,
                    )
    if options.json:
        print(
            json.dumps(
                {"congestion": options.congestion, "repeats": options.repeats, "lines": lines}, indent=2
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
