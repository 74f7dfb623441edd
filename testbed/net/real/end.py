"""The probing process at one end of a link between hosts, run there as a module of the testbed that is there, with an address.

It probes as `testbed.net.calibration.prober` does, by a socket of its own at that address: prints its port, reads the peer's
``[address, port]``, prints how large a packet to there may be, and then follows orders.

Nobody is privileged here, so a socket holds a few hundred packets: who sends would lose what comes in meanwhile. A process of its
own receives.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import sys
from typing import Any

from testbed import descriptors
from testbed.net.calibration.prober import ARRIVAL, Receiver, send
from testbed.net.sockets import SO_TIMESTAMPNS, enlarge_buffers

_BUFFER = 64 << 20
_PER_TURN = 256
_NUMBER = struct.Struct("=I")
_IP_MTU = 14  # ip(7); Python does not name it
_REPORT = 0  # in the place of a phase's number


def probe(address: str) -> None:
    """Follows orders until their end. Prints ``{"error": …}`` where the address is none of this host's."""
    gc.disable()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    enlarge_buffers(sock, _BUFFER, _BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    try:
        sock.bind((address, 0))
    except OSError as error:
        _say({"error": f"{address}: {error.strerror}"})
        return
    _say({"port": sock.getsockname()[1]})
    if not (peer := sys.stdin.buffer.readline()):
        return
    sock.connect(tuple(json.loads(peer)))
    _say({"mtu": sock.getsockopt(socket.IPPROTO_IP, _IP_MTU)})
    sock.setblocking(False)
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _receive(sock, theirs)
        os._exit(0)
    theirs.close()
    _follow(sock, ours)


def _follow(sock: socket.socket, receiver: socket.socket) -> None:
    while line := sys.stdin.buffer.readline():
        plan = json.loads(line)
        receiver.sendall(_NUMBER.pack(plan.get("phase", _REPORT)))
        (count,) = _NUMBER.unpack(_exactly(receiver, _NUMBER.size))
        if plan:
            _say(send(sock, plan))
            continue
        sys.stdout.buffer.write(b"%d\n" % count + _exactly(receiver, count * ARRIVAL.size))
        sys.stdout.buffer.flush()


def _receive(sock: socket.socket, orders: socket.socket) -> None:
    receiver = Receiver(sock)
    while True:
        waiting = descriptors.ready([sock, orders])
        while receiver.drain(_PER_TURN) and not descriptors.ready([orders], 0):
            pass
        if orders in waiting:
            order = orders.recv(_NUMBER.size, socket.MSG_WAITALL)
            if len(order) < _NUMBER.size:
                return
            (phase,) = _NUMBER.unpack(order)
            if phase == _REPORT:
                orders.sendall(_NUMBER.pack(len(receiver.arrivals)) + b"".join(receiver.arrivals))
            else:
                receiver.begin(phase)
                orders.sendall(_NUMBER.pack(0))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise SystemExit("the receiving process has ended")
        data += piece
    return data


def _say(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    probe(sys.argv[1])


if __name__ == "__main__":
    main()
