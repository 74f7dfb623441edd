"""The packets at both ends of links, written to files that Wireshark and tcpdump read: one process for all links of a network.

A program of its own, started by `testbed.net.fabric` inside the wire with nothing but the standard library:
``python capture.py PARENT SNAP LIMIT INTERFACE=DESCRIPTOR…``. It writes, for each interface, what comes in there and what goes
out, into a file that is open already: it opens none itself, being root. It ends with its PARENT process (0: when it is told
to), and a file ends at LIMIT bytes, or where the disk takes no more.

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
from time import time_ns

SNAP_BYTES = 128
"""Of each packet: all headers, and no more of what was sent than that leaves."""
LIMIT_BYTES = 256 << 20
_EVERY_PROTOCOL, _BATCH, _FLUSH_S, _WAITING_BYTES = 3, 64, 0.5, 1 << 16
_BUFFER_BYTES, _RCVBUFFORCE = 8 << 20, 33


def header(snap: int) -> bytes:
    """The beginning of a file."""
    return struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snap, 1)


def record(frame: bytes, length: int, at_ns: int) -> bytes:
    """A packet: its first bytes, its length, and its time in nanoseconds since 1970."""
    return struct.pack("=IIII", at_ns // 10**9, at_ns % 10**9, len(frame), length) + frame


class Tap:
    """One interface and its file."""

    def __init__(self, interface: str, descriptor: int, snap: int, limit: int) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        with contextlib.suppress(PermissionError):  # in a user namespace, net.core.rmem_default has to do
            self.socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER_BYTES)
        self.socket.bind((interface, _EVERY_PROTOCOL))
        self._file, self._snap, self._left = descriptor, snap, limit
        self._waiting, self._whole = bytearray(), 0
        self._write(header(snap))

    def _write(self, data: bytes) -> None:
        if len(data) <= self._left:
            self._waiting += data
            self._left -= len(data)
        else:
            self._left = 0

    def flush(self) -> None:
        """Writes what was taken in; where the disk takes no more, the file ends with the last packet that it has whole."""
        size = self._whole + len(self._waiting)
        try:
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
            self._whole = size
        except OSError:
            os.ftruncate(self._file, self._whole)
            self._waiting.clear()
            self._left = 0

    def read(self) -> None:
        """Takes in what waits."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BATCH):
                frame = self.socket.recv(1 << 16)
                self._write(record(frame[: self._snap], len(frame), time_ns()))
        if len(self._waiting) > _WAITING_BYTES:
            self.flush()


def main() -> None:
    """Captures until it is told to end, or its parent is gone."""
    parent, snap, limit = map(int, sys.argv[1:4])
    named = dict(argument.split("=", 1) for argument in sys.argv[4:])
    taps = {}
    for interface, file in named.items():
        tap = Tap(interface, int(file), snap, limit)
        taps[tap.socket.fileno()] = tap
    end = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("capturing", flush=True)
    poll = select.poll()
    for descriptor in taps:
        poll.register(descriptor, select.POLLIN)
    try:
        while not parent or os.getppid() == parent:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, end)  # it does not come while a file is written
            ready = poll.poll(int(1e3 * _FLUSH_S))
            signal.pthread_sigmask(signal.SIG_BLOCK, end)
            for descriptor, event in ready:
                if event & select.POLLIN:
                    taps[descriptor].read()
                else:  # the interface is gone
                    poll.unregister(descriptor)
            for tap in taps.values():
                tap.flush()
    finally:
        for tap in taps.values():
            tap.flush()


if __name__ == "__main__":
    main()
