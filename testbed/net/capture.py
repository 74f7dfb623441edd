"""The packets at both ends of links, written to files that Wireshark and tcpdump read: one process for all links of a network.

A program of its own, started by `testbed.net.fabric` inside the wire with nothing but the standard library:
``python capture.py PARENT SNAP LIMIT DIRECTORY INTERFACE=NAME…``. It writes DIRECTORY/NAME.pcap for each interface: what comes in
there and what goes out. It ends with its PARENT process (0: when it is told to), and a file ends at LIMIT bytes.

Format: https://datatracker.ietf.org/doc/html/draft-ietf-opsawg-pcap, nanoseconds, Ethernet.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from io import BufferedWriter
from pathlib import Path
from time import time_ns

SNAP_BYTES = 128
"""Of each packet: all headers, and no more of what was sent than that leaves."""
LIMIT_BYTES = 256 << 20
_EVERY_PROTOCOL, _BATCH, _FLUSH_S = 3, 64, 0.5
_BUFFER_BYTES, _RCVBUFFORCE = 8 << 20, 33


def header(snap: int) -> bytes:
    """The beginning of a file."""
    return struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snap, 1)


def record(frame: bytes, length: int, at_ns: int) -> bytes:
    """A packet: its first bytes, its length, and its time in nanoseconds since 1970."""
    return struct.pack("=IIII", at_ns // 10**9, at_ns % 10**9, len(frame), length) + frame


class Tap:
    """One interface and its file."""

    def __init__(self, interface: str, path: Path, snap: int, limit: int) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        with contextlib.suppress(PermissionError):  # in a user namespace, net.core.rmem_default has to do
            self.socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER_BYTES)
        self.socket.bind((interface, _EVERY_PROTOCOL))
        self.file: BufferedWriter = path.open("wb")
        self._snap, self._left = snap, limit
        self._write(header(snap))

    def _write(self, data: bytes) -> None:
        if len(data) <= self._left:
            self.file.write(data)
            self._left -= len(data)
        else:
            self._left = 0

    def read(self) -> None:
        """Takes in what waits."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BATCH):
                frame = self.socket.recv(1 << 16)
                self._write(record(frame[: self._snap], len(frame), time_ns()))


def main() -> None:
    """Captures until it is told to end, or its parent is gone."""
    parent, snap, limit, directory = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    named = dict(argument.split("=", 1) for argument in sys.argv[5:])
    taps = {}
    for interface, name in named.items():
        tap = Tap(interface, directory / f"{name}.pcap", snap, limit)
        taps[tap.socket.fileno()] = tap
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("capturing", flush=True)
    poll = select.poll()
    for descriptor in taps:
        poll.register(descriptor, select.POLLIN)
    while not parent or os.getppid() == parent:
        for descriptor, event in poll.poll(int(1e3 * _FLUSH_S)):
            if event & select.POLLIN:
                taps[descriptor].read()
            else:  # the interface is gone
                poll.unregister(descriptor)
        for tap in taps.values():
            tap.file.flush()


if __name__ == "__main__":
    main()
