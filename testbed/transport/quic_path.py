"""The way that a QUIC connection's datagrams go: a UDP socket, and what becomes of that where one end has another address by now.

A client whose address is gone goes on from the one that its machine has instead, by another of the names that the server gave the
connection (RFC 9000, 9). A server hears of it by what comes from there, and follows.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterable

Address = tuple[str, int]
BUFFER = 4 << 20  #: of the socket, as far as net.core.rmem_max lets it
#: What says that there is no way to the peer from here now. A datagram that finds none is lost, as on any link.
_NO_WAY = frozenset(
    {errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
)
#: For so long a server bears that nobody is where its client was: the client may be somewhere else, and say so.
_MISSED_S = 3.0
_ADDRESSES = 0x10  # RTMGRP_IPV4_IFADDR of linux/rtnetlink.h: told of addresses that come and go


class Path:
    """Made by who has its socket, which is connected; of one thread."""

    def __init__(self, sock: socket.socket, client: bool) -> None:
        self.socket = _buffered(sock)
        self.peer: Address = sock.getpeername()
        self.lasting = False  #: the handshake is done: the client may be somewhere else now
        self._client = client
        self._latest = self.peer
        self._missed_at: float | None = None  #: when the peer was first not where it was
        #: of a client: can be read when an address of its machine came or went; see `gone`
        self.changes = _address_changes() if client else None

    def gone(self) -> bool:
        """Whether the client's own address is no longer its machine's."""
        if self.changes is None or not _drained(self.changes):
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
        """Send a datagram; False: it found no way. Raises OSError where it never will."""
        try:
            if peer == self.peer or self._client:
                self.socket.send(data)
            else:
                self.socket.sendto(data, peer)
        except OSError as error:
            self._bear(error)
            return False
        return True

    def receive(self) -> tuple[Address, bytes] | None:
        """A datagram that is there, and whose (of what came before this socket was connected to another, the one before's); None:
        none is. Raises OSError, such as where the peer is gone."""
        try:
            data, peer = self.socket.recvfrom(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            self._bear(error)
            return None
        return peer, data

    def heard(self, peer: Address) -> None:
        """The peer is there, by whichever socket that was told."""
        self._missed_at, self._latest = None, peer

    def _bear(self, error: OSError) -> None:
        """Raises what no other way would mend."""
        if error.errno in _NO_WAY:  # in a handshake, too, which is then begun again
            return
        now = time.monotonic()
        if self._client or not self.lasting or not isinstance(error, ConnectionRefusedError):
            raise error
        self._missed_at = self._missed_at or now
        if now - self._missed_at > _MISSED_S:
            raise error

    def follow(self, peers: Iterable[Address]) -> None:
        """Of a server, to whom all of a flight went: where that is another than before, who was heard last, be connected to that
        one. What the library still tries of the path before is none."""
        (peer, *others) = set(peers) or {self.peer}
        if not self._client and not others and peer == self._latest != self.peer:
            with contextlib.suppress(OSError):  # no way there: the next flight will tell
                self.socket.connect(peer)
                self.peer = peer

    def close(self) -> None:
        """Let go of its sockets."""
        self.socket.close()
        if self.changes is not None:
            self.changes.close()


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
