"""One end of a background flow: a program of its own, started inside a node with nothing but the standard library.

    python flow.py receive KIND                                   prints its port, then counts what comes in
    python flow.py send KIND ADDRESS PORT RATE START STOP         sends (bits per second; seconds from now; 0: no limit)

KIND is tcp or udp. Each ends when its standard input does, which its owner holds open, and prints ``{"bytes": …, "seconds": …}``:
what crossed, and the time from the first byte to the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from math import inf
from time import monotonic
from typing import Any

DATAGRAM_BYTES = 1200
CHUNK_BYTES = 16_384
_NOBODY, _CONNECT_S = 65534, 10.0


class Count:
    """Bytes, and when the first and the last of them passed."""

    def __init__(self) -> None:
        self.bytes, self.first, self.last = 0, 0.0, 0.0

    def add(self, size: int) -> None:
        """So many more, now."""
        self.last = monotonic()
        self.first = self.first or self.last
        self.bytes += size

    def text(self) -> str:
        return json.dumps({"bytes": self.bytes, "seconds": self.last - self.first})


def receive(kind: str) -> Count:
    """Counts what arrives until standard input ends."""
    stream = kind == "tcp"
    count, buffer = Count(), bytearray(1 << 16)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        if stream:
            sock.listen(1)
        print(sock.getsockname()[1], flush=True)
        reading: list[Any] = [sys.stdin, sock]
        while True:
            ready = select.select(reading, [], [])[0]
            if sys.stdin in ready:
                return count
            if stream and sock in ready:
                reading = [sys.stdin, sock.accept()[0]]
                continue
            size = reading[1].recv_into(buffer)
            if size == 0 and stream:
                reading = [sys.stdin]
            elif size:
                count.add(size)


def send(kind: str, address: str, port: int, rate_bps: float, start_s: float, stop_s: float) -> Count:
    """Sends at the rate, evenly, until it is time to stop or standard input ends."""
    stream = kind == "tcp"
    begun, size = monotonic(), CHUNK_BYTES if stream else DATAGRAM_BYTES
    end = begun + stop_s if stop_s else inf
    count, data, gap = Count(), os.urandom(size), 8 * size / rate_bps if rate_bps else 0.0
    if select.select([sys.stdin], [], [], start_s)[0]:
        return count
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as sock:
        sock.settimeout(_CONNECT_S)
        sock.connect((address, port))
        sock.setblocking(False)
        due, offset = monotonic(), 0
        while (now := monotonic()) < end:
            if select.select([sys.stdin], [sock], [], min(0.2, end - now))[0]:
                return count
            wait = due - monotonic()
            if wait > 0:
                if select.select([sys.stdin], [], [], min(wait, end - now))[0]:
                    return count
                continue
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                sent = sock.send(data[offset:])
                count.add(sent)
                offset = (offset + sent) % size
                if offset == 0:
                    due = max(due + gap, monotonic() - 0.1)  # what a full link held up is not made up for
        return count


def main() -> None:
    if os.geteuid() == 0 and "TESTBED_ROOTLESS" not in os.environ:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    role, kind, *rest = sys.argv[1:]
    if role == "receive":
        count = receive(kind)
    else:
        address, port, *numbers = rest
        count = send(kind, address, int(port), *(float(number) for number in numbers))
        select.select([sys.stdin], [], [])
    print(count.text(), flush=True)


if __name__ == "__main__":
    main()
