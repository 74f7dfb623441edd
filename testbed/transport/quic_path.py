"""The way that a QUIC connection's datagrams go: a UDP socket, and what becomes of that where one end has another address by now.

A client whose address is gone goes on from the one that its machine has instead, by another of the names that the server gave the
connection (RFC 9000, 9). A server hears of it by what comes from there, and follows.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

Address = tuple[str, int]
BUFFER = 4 << 20  #: of the socket, as far as net.core.rmem_max lets it
#: What says that there is no way to the peer from here now. A datagram that finds none is lost, as on any link.
_NO_WAY = frozenset(
    {errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
)
_ADDRESSES = 0x10  # RTMGRP_IPV4_IFADDR of linux/rtnetlink.h: told of addresses that come and go


class Path:
    """Made by who has its socket, which is connected; of one thread."""

    def __init__(self, sock: socket.socket, client: bool) -> None:
        self.socket = _buffered(sock)
        self.peer: Address = sock.getpeername()
        self._client = client
        self._changes = _address_changes() if client else None

    @property
    def awaited(self) -> list[socket.socket]:
        """What can be read when an address came or went; see `gone`."""
        return [self._changes] if self._changes is not None else []

    def gone(self) -> bool:
        """Whether the client's own address is no longer its machine's."""
        if self._changes is None or not _drained(self._changes):
            return False
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
            try:
                trial.bind((self.socket.getsockname()[0], 0))
            except OSError as error:
                return error.errno == errno.EADDRNOTAVAIL
        return False

    def move(self) -> bool:
        """Go on from an address that the machine has; whether there is one that leads to the peer."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.connect(self.peer)
        except OSError:
            sock.close()
            return False
        self.socket.close()
        self.socket = _buffered(sock)
        return True

    def send(self, data: bytes, peer: Address) -> bool:
        """Send a datagram; False: it found no way. Raises OSError, such as where nobody listens there."""
        try:
            if peer == self.peer or self._client:
                self.socket.send(data)
            else:
                self.socket.sendto(data, peer)
        except OSError as error:
            if error.errno not in _NO_WAY:
                raise
            return False
        return True

    def follow(self, peers: Iterable[Address]) -> None:
        """Of a server, to whom all of a flight went: where that is another than before, be connected to that one."""
        (peer, *others) = set(peers) or {self.peer}
        if not self._client and not others and peer != self.peer:
            with contextlib.suppress(OSError):  # no way there: the next flight will tell
                self.socket.connect(peer)
                self.peer = peer

    def close(self) -> None:
        """Let go of its sockets."""
        self.socket.close()
        if self._changes is not None:
            self._changes.close()


def _buffered(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    return sock


def _address_changes() -> socket.socket | None:
    """A socket that can be read when an address came or went; None where the kernel does not tell everybody."""
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    except OSError:
        return None
    try:
        sock.bind((0, _ADDRESSES))
    except OSError:
        sock.close()
        return None
    return sock


def _drained(sock: socket.socket) -> bool:
    """Whether there was something to read, of which nothing is left."""
    told = False
    with contextlib.suppress(OSError):  # nothing more; or more than it had room for, which tells as much
        while sock.recv(65536):
            told = True
    return told
