"""How fast the transports move bytes here, and up to which rate of a link each keeps up; and QUIC libraries, without ours.

sudo .venv/bin/python -m benchmarks.transports [--size 10mb] [--repeats 3] [--rates 20,50,100,150,200] [--delay 5ms] [--json]
        [--transport tcp quic …] [--library qh3 aioquic …]

loopback: both ends in one process, megabits a second. libraries: two connections of each that is installed, by one thread over
loopback, and nothing of ours between. links: emulated; a transport keeps up with a rate where it takes at most 1.1 times as
long as TCP.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import socket
import ssl
import statistics
import sys
import time
from typing import Any

from benchmarks.datagram_loss import crossing
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology
from testbed.transport.secret import made_certificate
from testbed.transport.transport import TRANSPORTS, parse
from testbed.units import parse_size

_CHUNK = 256 * 1024
_KEEPS_UP = 1.1


def loopback(name: str, size: int, repeats: int) -> float:
    """Megabits a second between two nodes without a link: the median."""
    payload = os.urandom(size)
    chunks = [payload[i : i + _CHUNK] for i in range(0, size, _CHUNK)]
    took = [crossing(None, parse(name), chunks).usable_s for _ in range(repeats)]
    return size * 8e-6 / statistics.median(took)


class _Side:
    """One library's connection, and its socket."""

    def __init__(self, library: str, sock: socket.socket, client: bool, first: bytes = b"") -> None:
        connection = importlib.import_module(f"{library}.quic.connection")
        configuration = importlib.import_module(f"{library}.quic.configuration").QuicConfiguration(
            is_client=client,
            alpn_protocols=["x"],
            server_name="testbed",
            verify_mode=ssl.CERT_NONE,
            max_data=16 << 20,
            max_stream_data=16 << 20,
        )
        if not client:
            _certify(library, configuration)
        about = {} if client else {"original_destination_connection_id": first[6 : 6 + first[5]]}
        self.quic = connection.QuicConnection(configuration=configuration, **about)
        self.socket = sock
        self.received, self.ready = 0, False

    def move(self, peer: tuple[str, int]) -> None:
        """Take what has come, and send what may be sent."""
        now = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                self.quic.receive_datagram(self.socket.recv(65536), peer, now)
        timer = self.quic.get_timer()
        if timer is not None and timer <= now:
            self.quic.handle_timer(now)
        while (event := self.quic.next_event()) is not None:
            kind = type(event).__name__
            self.ready = self.ready or kind == "HandshakeCompleted"
            self.received += len(event.data) if kind == "StreamDataReceived" else 0
        for data, _ in self.quic.datagrams_to_send(time.monotonic()):
            with contextlib.suppress(BlockingIOError):
                self.socket.sendto(data, peer)


def _certify(library: str, configuration: Any) -> None:
    chain, key = made_certificate()
    if library == "qh3":
        configuration.load_cert_chain(chain, key)
        return
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    configuration.certificate = x509.load_pem_x509_certificate(chain)
    configuration.private_key = load_pem_private_key(key, None)


def library_mbps(library: str, size: int) -> float:
    """Megabits a second on a stream of this library, both ends by one thread."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
    here, there = (sock.getsockname() for sock in sockets)
    client = _Side(library, sockets[0], client=True)
    client.quic.connect(there, time.monotonic())
    first = client.quic.datagrams_to_send(time.monotonic())
    server = _Side(library, sockets[1], client=False, first=first[0][0])
    for data, _ in first:
        client.socket.sendto(data, there)
    until = time.monotonic() + 60
    while not (client.ready and server.ready) and time.monotonic() < until:
        server.move(here)
        client.move(there)
    started = time.monotonic()
    client.quic.send_stream_data(0, os.urandom(size))
    while server.received < size and time.monotonic() < until:
        client.move(there)
        server.move(here)
    took = time.monotonic() - started
    client.socket.close()
    server.socket.close()
    return server.received * 8e-6 / took


def links(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """A line for each rate and transport."""
    lines = []
    for rate in options.rates.split(","):
        profile = parse_profile(f"rate={rate}mbit,delay={options.delay}")
        topology = Topology(
            "rate", (Node("edge"), Node("cloud")), (Link("link", "edge", "cloud", profile, "cubic"),)
        )
        payload = os.urandom(parse_size(options.size))
        chunks = [payload[i : i + _CHUNK] for i in range(0, len(payload), _CHUNK)]
        took: dict[str, list[float]] = {name: [] for name in names}
        with Fabric.build(topology, options.emulator) as fabric:
            for _ in range(options.repeats):
                for name in names:
                    took[name].append(crossing(fabric, parse(name), chunks).usable_s)
                    fabric.settle("link")
        tcp = statistics.median(took["tcp"])
        for name, each in took.items():
            median = statistics.median(each)
            goodput = len(payload) * 8e-6 / median
            lines.append(
                {"rate_mbps": float(rate), "transport": name, "mbps": goodput, "times_tcp": median / tcp}
            )
    return lines


def main() -> int:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="10mb")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", default="20,50,100,150,200", help="Mbit/s")
    parser.add_argument("--delay", default="5ms", help="one-way")
    parser.add_argument("--transport", nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--library", nargs="*", default=["qh3", "aioquic"])
    parser.add_argument("--emulator", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = list(dict.fromkeys(["tcp", *options.transport]))
    size = parse_size(options.size)
    value: dict[str, Any] = {"loopback_mbps": {}, "library_mbps": {}}
    for name in names:
        value["loopback_mbps"][name] = loopback(name, size, options.repeats)
    for library in options.library:
        with contextlib.suppress(ImportError):
            runs = [library_mbps(library, size) for _ in range(options.repeats)]
            value["library_mbps"][library] = statistics.median(runs)
    value["links"] = links(options, names)
    value["keeps_up_mbps"] = {
        name: max(
            (
                line["rate_mbps"]
                for line in value["links"]
                if line["transport"] == name and line["times_tcp"] <= _KEEPS_UP
            ),
            default=0.0,
        )
        for name in names
    }
    if options.json:
        print(json.dumps(value, indent=2))
        return 0
    for title in ("loopback_mbps", "library_mbps"):
        print(title)
        for name, mbps in value[title].items():
            print(f"  {name:<26} {mbps:8.1f}")
    print(" rate Mbit/s  transport                   Mbit/s  times TCP")
    for line in value["links"]:
        print(
            f"{line['rate_mbps']:12g}  {line['transport']:<26} {line['mbps']:7.1f} {line['times_tcp']:10.2f}"
        )
    for name, rate in value["keeps_up_mbps"].items():
        print(f"{name} keeps up with {rate:g} Mbit/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
