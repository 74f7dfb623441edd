"""One end of a link between hosts, run there as a module of the testbed that is there. Two things it does:

    address INTERFACE|-       prints a line of JSON: the IPv4 address of the interface, and all interfaces' of this host
    probe ADDRESS             a probing process as `testbed.net.calibration.prober` is one, by a socket of its own at ADDRESS:
                              prints its port, reads the peer's ``[address, port]``, and then follows orders

Nobody is privileged here, so a socket holds a few hundred packets: who sends would lose what comes in meanwhile. A process of its
own receives.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import socket
import struct
import sys
from typing import Any

from testbed.net.calibration.prober import ARRIVAL, Receiver, send
from testbed.net.sockets import SO_TIMESTAMPNS, enlarge_buffers

_SIOCGIFADDR = 0x8915
_BUFFER = 64 << 20
_PER_TURN = 256
_NUMBER = struct.Struct("=I")
_REPORT = 0  # in the place of a phase's number


def addresses() -> dict[str, str]:
    """IPv4 address by interface; of several, the first."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


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
        ready = select.select([sock, orders], [], [])[0]
        while receiver.drain(_PER_TURN) and not select.select([orders], [], [], 0)[0]:
            pass
        if orders in ready:
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
    """See above."""
    what, argument = sys.argv[1:3]
    if what == "address":
        known = addresses()
        _say({"address": known.get(argument), "interfaces": known})
    else:
        probe(argument)


if __name__ == "__main__":
    main()
