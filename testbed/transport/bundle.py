"""Several QUIC connections between the same two sides, used as one: each with a congestion window of its own.

Datagrams wait in one queue, from which each connection takes as its window has room, and are merged as they come. What needs an
order crosses by the first connection's stream. Each connection begins with a hello, behind the token, and on the others there is
nothing else but datagrams:

    0        16            17       18
    | bundle | connections | number |
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.transport.quic_connection import Connection, waited

_HELLO = struct.Struct("!16sBB")  #: `bundle` is the same for all of one, and drawn by the client


class Bundle:
    """Has what a `Connection` has for those who send and receive by it. Where one of them breaks it is broken: with fewer windows
    it would be another transport.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self.connections, self._first = tuple(connections), connections[0]
        self._parcels: deque[bytes] = deque()
        self._changed = (
            threading.Condition()
        )  # behind any connection's own: who has it asks for none of these
        for connection in connections:
            connection.join(self._parcels, self._heard, len(connections))

    def _heard(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _broken(self) -> str:
        errors = [connection.error for connection in self.connections if connection.error]
        return f"one of {len(self.connections)} connections broke: {errors[0]}" if errors else ""

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        """As the first one's."""
        self._first.write(pieces, deadline)

    def read_into(self, buffer: memoryview, deadline: Deadline, what: str) -> int:
        """As the first one's."""
        return self._first.read_into(buffer, deadline, what)

    def send_datagrams(self, parcels: Sequence[bytes], deadline: Deadline) -> None:
        """Have all of these sent by the deadline, each at most once, by whichever connection has room. Raises EndpointError."""
        self._parcels.extend(parcels)
        try:
            for connection in self.connections:
                connection.offer()
            with self._changed:
                what = "the link did not take a whole frame"
                waited(self._changed, self._all_sent, self._broken, deadline, what, None)
        finally:
            self._parcels.clear()

    def _all_sent(self) -> bool:
        return not self._parcels and not any(connection.carries for connection in self.connections)

    def wait_readable(self, deadline: Deadline, what: str, until: float | None = None) -> bool:
        """As a connection's, of datagrams of any and of the first one's stream."""
        with self._changed:
            return waited(self._changed, self._any_readable, self._broken, deadline, what, until)

    def _any_readable(self) -> bool:
        return self.readable or any(connection.arrived_at is not None for connection in self.connections)

    @property
    def readable(self) -> bool:
        """As the first one's."""
        return self._first.readable

    def datagrams(self) -> Iterator[tuple[float, bytes]]:
        """Those that have come, each once, and when: those of all connections in the order in which they came."""
        while True:
            waiting = [(at, n) for n, c in enumerate(self.connections) if (at := c.arrived_at) is not None]
            if not waiting:
                return
            yield from _one(self.connections[min(waiting)[1]])

    @property
    def sent(self) -> int:
        """Bytes on the wire, headers included."""
        return sum(connection.sent for connection in self.connections)

    @property
    def received(self) -> int:
        """Bytes on the wire, headers included."""
        return sum(connection.received for connection in self.connections)

    @property
    def lost(self) -> int:
        """Packets that were declared lost."""
        return sum(connection.lost for connection in self.connections)

    @property
    def rtt_s(self) -> float:
        """Of a round trip, smoothed, of the one that takes longest."""
        return max(connection.rtt_s for connection in self.connections)

    @property
    def least_rtt_s(self) -> float:
        """Least of the first one's."""
        return self._first.least_rtt_s

    @property
    def confirmed(self) -> bool:
        """As a connection's, of all."""
        return all(connection.confirmed for connection in self.connections)

    def finish(self, timeout: float) -> None:
        """As a connection's, of all at once."""
        for connection in self.connections:
            connection.end()
        until = time.monotonic() + timeout
        for connection in self.connections:
            connection.finish(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """Say so to the peer, and end."""
        for connection in self.connections:
            connection.close()

    def abort(self) -> None:
        """End them, and wake up whoever waits."""
        for connection in self.connections:
            connection.abort()


def _one(connection: Connection) -> Iterator[tuple[float, bytes]]:
    for arrived in connection.datagrams():
        yield arrived
        return


def hellos(count: int) -> list[bytes]:
    """What each of so many connections says first."""
    bundle = os.urandom(16)
    return [_HELLO.pack(bundle, count, number) for number in range(count)]


class Groups:
    """A listener's connections that wait for the others of their bundle. Each has a thread in `joined`, so there are no more than
    the listener lets in."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._groups: dict[bytes, dict[int, Connection]] = {}
        self._changed = threading.Condition()

    def joined(self, connection: Connection, deadline: Deadline) -> Bundle | None:
        """The whole bundle, to the thread of the first of its connections; None to the others'. Raises EndpointError where not
        all are there by the deadline, or one is not what it says."""
        bundle, count, number = _HELLO.unpack(_read(connection, deadline))
        if count != self._count or number >= count:
            raise EndpointError(f"connection {number} of {count}, where {self._count} belong together")
        with self._changed:
            group = self._groups.setdefault(bundle, {})
            if number in group:
                raise EndpointError(f"a second connection {number} of one bundle")
            group[number] = connection
            self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                self._changed.wait_for(lambda: len(group) == count, deadline.left())
            if self._groups.get(bundle) is group:
                del self._groups[bundle]
            if len(group) < count:
                raise EndpointError(f"only {len(group)} of {count} connections came")
        return Bundle([group[n] for n in range(count)]) if number == 0 else None


def _read(connection: Connection, deadline: Deadline) -> bytes:
    hello = memoryview(bytearray(_HELLO.size))
    got = 0
    while got < len(hello):
        count = connection.read_into(hello[got:], deadline, "no hello came")
        if not count:
            raise EndpointError("the connection ended before its hello")
        got += count
    return bytes(hello)
