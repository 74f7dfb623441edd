"""The probing process of one node: sends numbered UDP packets on schedule and notes when the other node's arrive.

A program of its own (`testbed.programs`) so that nothing else in Python shares its time. Arrivals carry the kernel's
receive time stamps (SO_TIMESTAMPNS, socket(7)), so it does not matter when this process gets to read them.

It takes orders on standard input, a line of JSON each: a plan (see `send`), answered with a line of JSON when all of it is
sent; then ``{}``, answered with the number of packets received, a line, and one `ARRIVAL` each.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import socket
import struct
import sys
import time
from math import inf
from typing import Any

from testbed import descriptors
from testbed.net.sockets import SO_TIMESTAMPNS
from testbed.programs import end_sleeps_exactly, schedule_in_real_time

MESSAGE = struct.Struct("=IIq")  # phase, number, CLOCK_MONOTONIC nanoseconds when sent
ARRIVAL = struct.Struct("=Iqq")  # number, sent, arrived (both CLOCK_MONOTONIC nanoseconds)
UDP_OVERHEAD = 28  # IPv4 and UDP headers
_UDP_SEGMENT, _UDP_GRO = 103, 104
_LARGEST = 1 << 16  # bytes of what one system call gives
_TIMESPEC = struct.Struct("@ll")
_READ_PER_TURN = 64
_PRIORITY = 1


class Receiver:
    """What came in on a socket, of one phase."""

    def __init__(self, sock: socket.socket, together: bool = False) -> None:
        """*together*: packets that were sent in one system call, and kept together by the link, are read in one, too (UDP_GRO,
        udp(7)). Not behind a network card, which might put others together."""
        self._sock, self._buffer = sock, bytearray(_LARGEST)
        if together:
            with contextlib.suppress(OSError):  # before Linux 5.0
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        self._phase, self._early = -1, list[bytes]()
        self.begin(0)

    def begin(self, phase: int) -> None:
        """Forgets what came in; from now on only packets of *phase* count. Of the next one those do that were there before: its
        sender may have been told earlier."""
        self.arrivals = self._early if phase == self._phase + 1 else []
        self._phase, self._early = phase, []
        # Time stamps come on the wall clock; on this host and for these seconds it runs alongside the monotonic one.
        self._offset = min(time.time_ns() - time.monotonic_ns() for _ in range(20))

    def drain(self, most: int) -> bool:
        """Reads up to *most* packets; whether there may be more."""
        for _ in range(most):
            try:
                length, ancillary, _, _ = self._sock.recvmsg_into([self._buffer], 128)
            except BlockingIOError:
                return False
            except ConnectionRefusedError:  # the other side's socket is gone: an ICMP message said so
                continue
            arrived, each = time.monotonic_ns(), length
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack_from(value)
                    arrived = seconds * 1_000_000_000 + nanoseconds - self._offset
                elif level == socket.IPPROTO_UDP and kind == _UDP_GRO:
                    each = int.from_bytes(value[:4], sys.byteorder)
            for place in range(0, length - MESSAGE.size + 1, max(each, MESSAGE.size)):
                phase, number, sent = MESSAGE.unpack_from(self._buffer, place)
                if phase == self._phase:
                    self.arrivals.append(ARRIVAL.pack(number, sent, arrived))
                elif phase == self._phase + 1:
                    self._early.append(ARRIVAL.pack(number, sent, arrived))
        return True


def send(sock: socket.socket, plan: dict[str, Any]) -> dict[str, Any]:
    """Sends ``packets`` (at most; at most for ``duration_s``) of ``bytes`` every ``interval_s``.

    Where that is very often, ``batch`` packets go at a time, in one system call (UDP_SEGMENT, udp(7)): else the sender would be
    slower than fast links, or have used up the time that the kernel gives to real-time processes, and pause.

    With ``catch_up`` a late sender makes up for lost time at once, so that the mean rate is right; without, the schedule
    shifts, so that no two packets are closer than the interval. ``pace`` changes the interval over time, which counts from
    ``begin_s`` where that is given (see `probes.PacketTrain`): a sender that is told too late leaves out what has passed.
    """
    ordered, pace = time.monotonic(), iter(plan.get("pace", ()))
    start = ordered if plan.get("begin_s") is None else plan["begin_s"]
    until, interval = next(pace, (inf, plan["interval_s"]))
    end = start + plan["duration_s"]
    size, batch = plan["bytes"], plan.get("batch", 1)
    if batch > 1:
        try:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
        except OSError:  # before Linux 4.18
            batch = 1
    packets, write = bytearray(batch * size), MESSAGE.pack_into
    due, number, phase, held_up = max(start, ordered), 0, plan["phase"], 0.0
    while number < plan["packets"] and due < end and (now := time.monotonic()) < end:
        if now < due:
            # No need to be punctual, since packets say when they were sent; and nothing to read meanwhile, since arrivals have
            # time stamps: on a slow machine, both would take the processor from what is measured.
            time.sleep(due - now)
            continue
        while due - start >= until:
            until, interval = next(pace, (inf, interval))
        count, stamp = min(batch, plan["packets"] - number), time.monotonic_ns()
        for place in range(count):
            write(packets, place * size, phase, number + place, stamp)
        try:
            sock.send(memoryview(packets)[: count * size])
        except (BlockingIOError, ConnectionRefusedError):
            pass
        except OSError as error:
            if batch == 1 or error.errno not in (errno.EINVAL, errno.EMSGSIZE):
                raise
            # The path takes smaller packets only: single ones are sent in pieces.
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
            batch = 1
            continue
        number += count
        held_up = max(held_up, now - due)
        due = count * interval + (due if plan["catch_up"] else max(due, now))
    if batch > 1:
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
    return {"sent": number, "took_s": time.monotonic() - start, "held_up_s": held_up}


def main() -> None:
    """Follows orders until their end; the arguments are the socket's file descriptor and whether to be ``urgent``."""
    gc.disable()
    if sys.argv[2:] == ["urgent"]:
        # A gap in a saturating flow that outlasts the link's queue is a gap in what is measured. Not with one processor, where
        # real time would keep the kernel's own threads from moving packets.
        if (os.cpu_count() or 1) > 1:
            schedule_in_real_time(_PRIORITY)
        end_sleeps_exactly()
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(False)
    receiver, orders, answers = Receiver(sock, together=True), sys.stdin.buffer, sys.stdout.buffer
    while True:
        while not descriptors.ready([orders], 0.005):
            while receiver.drain(_READ_PER_TURN):
                pass
        line = orders.readline()
        if not line:
            return
        if plan := json.loads(line):
            receiver.begin(plan["phase"])
            answers.write(json.dumps(send(sock, plan)).encode() + b"\n")
        else:
            while receiver.drain(_READ_PER_TURN):
                pass
            answers.write(b"%d\n" % len(receiver.arrivals) + b"".join(receiver.arrivals))
        answers.flush()
