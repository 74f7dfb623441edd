"""How soon a cache is usable over a link that loses packets: by datagrams with repair, by streams, by the kernel's TCP.

sudo .venv/bin/python -m benchmarks.datagram_loss [--loss 0,1,2,5] [--rtt 20,50,100] [--rate 50mbit] [--size 1mb]
        [--chunk 64kb] [--repeats 5] [--transport tcp 'datagram(fec=0.05)' …] [--out loss.json] [--minutes 8]
python -m benchmarks.datagram_loss --table loss.json [more.json …]

A payload crosses in chunks, on a connection of its own each time; the transports take turns, and a TCP whose congestion control
the kernel has not is left out. *usable*: from the first byte handed over until nothing more comes, in the median, with the least
and the most; *ratio*: to the first transport's, round by round, in the median; *chunks*: the share that came.

With `--out` every round is written to that file as soon as it is done, and those that are there are not done again. With
`--minutes` no round begins later: the same call, made again, goes on (exit status 3: there is more to do). `--table` prints what
files hold, all in one table, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.deadline import Deadline
from testbed.hosts.namespaces import inside
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from testbed.transport import wire
from testbed.transport.transport import Transport, parse
from testbed.units import parse_size

TRANSPORTS = (
    "tcp(congestion=cubic)",
    "tcp(congestion=bbr)",
    "datagram(fec=0.02)",
    "datagram(fec=0.02, connections=4)",
    "datagram(fec=0.05, connections=4)",
)
_LONGEST_S = 120.0


#: A payload's crossing with all that it depends on; `round` counts from 0.
Record = dict[str, Any]


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


def rounds(options: argparse.Namespace, loss: str, rtt: str, done: list[Record]) -> Iterator[list[Record]]:
    """Those that a link still lacks, each a crossing by every transport that lacks it."""
    delay = float(rtt) / 2
    about = {"loss_percent": float(loss), "rtt_ms": float(rtt)}
    about |= {name: getattr(options, name) for name in ("rate", "size", "chunk")}
    there = {(r["round"], r["transport"]) for r in done if about.items() <= r.items()}
    lacking = {n: [t for t in options.transport if (n, t) not in there] for n in range(options.repeats)}
    if not any(lacking.values()):
        return
    profile = parse_profile(
        f"rate={options.rate},delay={delay:g}ms" + (f",loss={loss}%" if loss != "0" else "")
    )
    topology = Topology("loss", (Node("edge"), Node("cloud")), (Link("link", "edge", "cloud", profile),))
    payload, chunk = os.urandom(parse_size(options.size)), parse_size(options.chunk)
    chunks = [payload[i : i + chunk] for i in range(0, len(payload), chunk)]
    with Fabric.build(topology, options.emulator) as fabric:
        for number, transports in lacking.items():
            made = []
            for text in transports:
                crossed = asdict(crossing(fabric, parse(text), chunks)) | {"chunks": len(chunks)}
                made.append(about | {"transport": text, "round": number} | crossed)
                fabric.settle("link")
            yield made


def lines(records: list[Record]) -> Iterator[str]:
    """A table: a line for each link and transport."""
    yield "| loss | RTT, ms | transport | n | usable, s | ratio | chunks | MB on the wire | connect, s |"
    yield "|--:|--:|---|--:|--:|--:|--:|--:|--:|"
    links = sorted({(r["rtt_ms"], r["loss_percent"]) for r in records})
    for rtt, loss in links:
        here = [r for r in records if (r["rtt_ms"], r["loss_percent"]) == (rtt, loss)]
        first = {
            (r["round"], r["file"]): r["usable_s"] for r in here if r["transport"] == here[0]["transport"]
        }
        for text in dict.fromkeys(r["transport"] for r in here):
            own = [r for r in here if r["transport"] == text]
            usable = [r["usable_s"] for r in own]
            ratios = [r["usable_s"] / first[key] for r in own if (key := (r["round"], r["file"])) in first]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            middle = {name: statistics.median(r[name] for r in own) for name in ("wire_bytes", "connect_s")}
            yield (
                f"| {loss:g} % | {rtt:g} | `{text}` | {len(own)} "
                f"| {statistics.median(usable):.2f} ({min(usable):.2f} to {max(usable):.2f}) | {ratio} "
                f"| {sum(r['came'] for r in own) / sum(r['chunks'] for r in own):.1%} "
                f"| {middle['wire_bytes'] / 1e6:.2f} | {middle['connect_s']:.3f} |"
            )


def read(files: list[Path]) -> list[Record]:
    """The crossings that files hold, each with its file's number."""
    return [
        r | {"file": n} for n, file in enumerate(files) for r in json.loads(file.read_text())["crossings"]
    ]


def had(text: str) -> bool:
    """Whether the kernel has what that transport asks for."""
    wanted = getattr(parse(text), "congestion", None)
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
    return not wanted or wanted in available.read_text().split()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loss", default="0,1,2,5", help="percent, each way")
    parser.add_argument("--rtt", default="20,50,100", help="ms")
    parser.add_argument("--rate", default="50mbit")
    parser.add_argument("--size", default="1mb")
    parser.add_argument("--chunk", default="64kb")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--transport", nargs="+", default=TRANSPORTS, help="ratios are to the first one")
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--out", type=Path, help="where crossings are kept, and which are not done again")
    parser.add_argument("--minutes", type=float, help="after which no round begins")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print what these hold")
    options = parser.parse_args()
    options.transport = [text for text in options.transport if had(text)]
    return options


def main() -> int:
    """Measure what is lacking, and print a table of all."""
    options, began = arguments(), time.monotonic()
    if options.table:
        print(*lines(read(options.table)), sep="\n")
        return 0
    records = read([options.out]) if options.out and options.out.exists() else []
    for rtt in options.rtt.split(","):
        for loss in options.loss.split(","):
            for made in rounds(options, loss, rtt, records):
                records += [record | {"file": 0} for record in made]
                if options.out:
                    options.out.write_text(json.dumps({"crossings": records}, indent=1) + "\n")
                if options.minutes and time.monotonic() - began > options.minutes * 60:
                    print(*lines(records), "there is more to do: make the same call again", sep="\n")
                    return 3
    print(*lines(records), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
