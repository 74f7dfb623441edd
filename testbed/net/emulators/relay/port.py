"""A packet socket on one of the wire's interfaces: what arrives there, many packets a system call, and when each arrived.

The kernel stamps packets as they arrive, so it does not matter when this process gets to read them. See packet(7), recvmmsg(2).
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
from time import monotonic, time

from testbed.net.sockets import SO_TIMESTAMPNS, enlarge_buffers

SOL_PACKET = 263
PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 6, 15, 23
ALL_PROTOCOLS = 0x0003
BUFFER_BYTES = 128 << 20  # a relay that does not get to run for a while loses nothing
BATCH = 64
_LARGEST = 1 << 17  # a super-packet with its headers
_CONTROL = 64
_MSG_DONTWAIT, _MSG_TRUNC = 0x40, 0x20
_MESSAGE = struct.Struct("=QIIQQQQIiI4x")  # struct mmsghdr
_RESULT = struct.Struct("=QI4xI")  # its end, from 40 on: length of control data, flags, length received
_IOVEC = struct.Struct("=QQ")
_STAMP = struct.Struct("=QiiQQ")  # struct cmsghdr and struct timespec
assert _MESSAGE.size == 64


def open_port(interface: str) -> socket.socket:
    """A socket that takes what arrives at an interface of the calling thread's namespace, and sends there."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        port.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        enlarge_buffers(port, BUFFER_BYTES, BUFFER_BYTES)
        port.setblocking(False)
        port.bind((interface, ALL_PROTOCOLS))
    except BaseException:
        port.close()
        raise
    return port


class Port:
    """Sends frames (see `packet`) on a datagram socket, which may also be one of a pair."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self.send = self._socket.send
        self.close = self._socket.close
        self.fileno = descriptor
        self.latest = 0.0  # when the last packet arrived
        self._lost = 0

    def count_lost(self) -> int:
        """Packets that the kernel had no room for, so far."""
        try:
            answer = self._socket.getsockopt(
                SOL_PACKET, PACKET_STATISTICS, 8
            )  # since the last time it was asked
            self._lost += struct.unpack("=II", answer)[1]
        except OSError:  # no packet socket
            pass
        return self._lost


class Receiver:
    """Reads many frames at a time, from any port."""

    def __init__(self) -> None:
        self._arena = mmap.mmap(-1, BATCH * _LARGEST)
        self._control = ctypes.create_string_buffer(BATCH * _CONTROL)
        self._messages = ctypes.create_string_buffer(BATCH * _MESSAGE.size)
        self._vectors = ctypes.create_string_buffer(BATCH * _IOVEC.size)
        arena = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        control, vectors = ctypes.addressof(self._control), ctypes.addressof(self._vectors)
        for slot in range(BATCH):
            _IOVEC.pack_into(self._vectors, slot * _IOVEC.size, arena + slot * _LARGEST, _LARGEST)
            vector = vectors + slot * _IOVEC.size
            _MESSAGE.pack_into(
                self._messages, slot * 64, 0, 0, 0, vector, 1, control + slot * _CONTROL, _CONTROL, 0, 0, 0
            )
        self._recvmmsg = ctypes.CDLL(None).recvmmsg

    def receive(self, port: Port) -> list[tuple[float, bytes]]:
        """Up to `BATCH` frames that wait at a port, each with the time (CLOCK_MONOTONIC) at which it arrived."""
        count = self._recvmmsg(port.fileno, self._messages, BATCH, _MSG_DONTWAIT, None)
        if count <= 0:
            return []
        now = monotonic()
        offset = time() - now
        frames = []
        read, stamp, arena, latest = _RESULT.unpack_from, _STAMP.unpack_from, self._arena, port.latest
        for slot in range(count):
            used, flags, length = read(self._messages, slot * 64 + 40)
            arrived = now
            if used:
                _, _, kind, seconds, nanoseconds = stamp(self._control, slot * _CONTROL)
                if kind == SO_TIMESTAMPNS:
                    arrived = seconds + nanoseconds * 1e-9 - offset
            # The kernel writes how much it used, and reads it as how much there is.
            _CONTROL_LENGTH.pack_into(self._messages, slot * 64 + 40, _CONTROL)
            # The wall clock may be set meanwhile; the packets came after the ones before, and before now.
            latest = now if arrived > now else max(arrived, latest)
            if length >= _LEAST and not flags & _MSG_TRUNC:
                start = slot * _LARGEST
                frames.append((latest, arena[start : start + length]))
        port.latest = latest
        return frames


_CONTROL_LENGTH = struct.Struct("=Q")
_LEAST = 10 + 14
