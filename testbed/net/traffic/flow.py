"""One end of a background flow: a program of its own, started inside a node with nothing but the standard library.

    python flow.py receive KIND                                   prints its port, then counts what comes in
    python flow.py send KIND ADDRESS PORT RATE START STOP         sends (bits per second; seconds from now; 0: no limit)

KIND is tcp, udp or iperf3, which runs that program and reads its report. Each ends when its standard input does, which its owner
holds open, and prints ``{"bytes": …, "seconds": …}``: what crossed, and the time from the first byte to the last.
"""

from __future__ import annotations

import contextlib
import json
import os
import select  # all files here have low numbers: it is a process that is given none
import signal
import socket
import subprocess
import sys
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any

DATAGRAM_BYTES = 1200
CHUNK_BYTES = 16_384
_CONNECT_S = 10.0
_LISTENING, _START_S, _REPORT_S = "0A", 5.0, 3.0
_LONGEST_S = 86_400  # that iperf3 understands


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


def serve_iperf3() -> Count:
    """What iperf3's server took in until it was called once, or standard input ended."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    server = _iperf3("-s", "-4", "-1", "-p", str(port))
    given_up = monotonic() + _START_S
    while not _listens(port):
        if server.poll() is not None or monotonic() > given_up:
            raise SystemExit("iperf3 does not listen")
        sleep(0.01)
    print(port, flush=True)
    return _report(server, "sum_received", inf)


def call_iperf3(address: str, port: int, rate_bps: float, start_s: float, stop_s: float) -> Count:
    """What iperf3's client sent until its time was over, or standard input ended."""
    if select.select([sys.stdin], [], [], start_s)[0]:
        return Count()
    lasts = round(min(stop_s - start_s, _LONGEST_S)) if stop_s else _LONGEST_S
    rate = ["-b", str(round(rate_bps))] if rate_bps else []
    client = _iperf3("-c", address, "-p", str(port), "-t", str(max(1, lasts)), *rate)
    return _report(client, "sum_sent", stop_s - start_s if stop_s else inf)


def _iperf3(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["iperf3", "-J", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )


def _listens(port: int) -> bool:
    lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
    return any(int(line[1].rpartition(":")[2], 16) == port and line[3] == _LISTENING for line in lines)


def _report(process: subprocess.Popen[str], sums: str, lasts_s: float) -> Count:
    """Of an iperf3, when it has ended: by itself, or told to once standard input ends or its time is over."""
    end, said, count = monotonic() + lasts_s, "", Count()
    assert process.stdout is not None
    while True:  # its report is read as it comes, for a pipe does not hold that of an hour
        wait = None if end == inf else max(0.0, end - monotonic())
        ready = select.select([sys.stdin, process.stdout], [], [], wait)[0]
        if process.stdout in ready:
            piece = os.read(process.stdout.fileno(), 1 << 16).decode()
            said += piece
            if not piece:
                break
            continue
        process.send_signal(signal.SIGINT)  # it reports what it has done so far
        try:
            said += process.communicate(timeout=_REPORT_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
        break
    with contextlib.suppress(ValueError, LookupError, TypeError):  # none where nobody called
        total = json.loads(said)["end"][sums]
        count.bytes, count.last = int(total["bytes"]), float(total["seconds"])
    return count


def main() -> None:
    role, kind, *rest = sys.argv[1:]
    if role == "receive":
        count = serve_iperf3() if kind == "iperf3" else receive(kind)
        if kind == "iperf3":  # which ends when its client does
            select.select([sys.stdin], [], [])
    else:
        address, port, *numbers = rest
        rate, start, stop = map(float, numbers)
        if kind == "iperf3":
            count = call_iperf3(address, int(port), rate, start, stop)
        else:
            count = send(kind, address, int(port), rate, start, stop)
        select.select([sys.stdin], [], [])
    print(count.text(), flush=True)


if __name__ == "__main__":
    main()
