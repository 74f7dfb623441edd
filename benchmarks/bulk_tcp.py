"""One TCP flow across an emulated link, as fast as it goes: what its receiver got, tenth of a second by tenth of a second."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial

from testbed.hosts.namespaces import call_inside
from testbed.net.fabric.fabric import Fabric

BIN_S = 0.1
_CHUNK, _BUFFER = 1 << 17, 1 << 18
_NORMAL = 0.25
_RAMP = 0.95  # of what is possible, over a second


@dataclass(frozen=True)
class Bulk:
    """Bytes of payload in each `BIN_S` from the first byte on; the congestion control that the sender used."""

    bins: tuple[int, ...]
    congestion: str

    def ramp_s(self, possible_bps: float) -> float | None:
        """When the first second began that had nearly all of *possible_bps*; None: there was none."""
        second = round(1 / BIN_S)
        for begin in range(len(self.bins) - second + 1):
            if sum(self.bins[begin : begin + second]) * 8 >= _RAMP * possible_bps:
                return begin * BIN_S
        return None

    def goodput_bps(self, begin_s: float, seconds: float, possible_bps: float) -> float:
        """Bits of payload per second, from *begin_s* on, for *seconds* or a little more.

        What has arrived behind a lost packet is not delivered before that is: nothing for a round trip or two, then all at once.
        So the count begins and ends where nothing waits like that, with a bin that has what is possible in its time.
        """
        begin = self._flowing(round(begin_s / BIN_S), possible_bps)
        end = self._flowing(begin + round(seconds / BIN_S), possible_bps)
        part = self.bins[begin:end]
        return 8 * sum(part) / (len(part) * BIN_S) if part else 0.0

    def _flowing(self, first: int, possible_bps: float) -> int:
        most = possible_bps * BIN_S / 8
        found = (i for i in range(first, len(self.bins)) if abs(self.bins[i] - most) < _NORMAL * most)
        return next(found, len(self.bins))


def bulk(fabric: Fabric, source: str, target: str, seconds: float) -> Bulk:
    """Sends from *source* to *target* until *seconds* after the first byte arrived."""
    listener = call_inside(fabric.namespace(target), partial(_listen, fabric.address(target)))
    sender = call_inside(fabric.namespace(source), lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with listener, sender:
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        congestion = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        stop = threading.Event()
        sending = threading.Thread(target=_send, args=(sender, stop), daemon=True)
        sending.start()
        try:
            with receiver:
                return Bulk(_receive(receiver, seconds), congestion)
        finally:
            stop.set()
            sending.join()


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1)
    return listener


def _send(sock: socket.socket, stop: threading.Event) -> None:
    data = bytes(_CHUNK)
    with contextlib.suppress(OSError):  # the receiver has seen enough
        while not stop.is_set():
            sock.send(data)


def _receive(sock: socket.socket, seconds: float) -> tuple[int, ...]:
    """Whole bins alone."""
    buffer, bins, begun = bytearray(_BUFFER), [0], 0.0
    while True:
        size = sock.recv_into(buffer)
        now = time.monotonic()
        begun = begun or now
        place = int((now - begun) / BIN_S)
        bins += [0] * (place + 1 - len(bins))
        if place * BIN_S >= seconds or not size:
            return tuple(bins[:-1])
        bins[place] += size


def start_up_s(round_trip_s: float) -> float:
    """How long a flow's start-up is given: a second, and twenty round trips, in which slow start overshoots and what the queue
    then drops is repaired."""
    return 1.0 + 20 * round_trip_s
