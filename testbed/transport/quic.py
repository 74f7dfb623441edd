"""Frames over one stream of a QUIC connection, by qh3: encrypted, under its congestion control (CUBIC with HyStart++)."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.transport.bundle import Bundle, Groups, hellos
from testbed.transport.pending import Pending
from testbed.transport.quic_connection import Connection
from testbed.transport.quic_path import BUFFER
from testbed.transport.secret import PATIENCE_S, Complaints, made_certificate, require_token
from testbed.transport.transport import Listener, Stats, Stream, Transport

if TYPE_CHECKING:
    from qh3.quic.configuration import QuicConfiguration

_PROTOCOL = "testbed"  # ALPN
_IDLE_S = 7200.0  #: no connection ends by itself while a run goes on: whoever waits has a deadline
_HANDSHAKE_S = 10.0
_ATTEMPT_S = 2.0  #: until a handshake is begun anew, the first time; then twice as long each time
_INITIAL_RTT_S = (
    0.1  #: what is taken for a round trip before one is known, after two of which what was lost is sent again
)
_DATAGRAM = 1500  #: the longest that is taken
_MOST_PENDING = (
    64  #: handshakes under way (`Pending`), for each connection of a stream: those of one wait for each other
)
_SMALLEST_INITIAL = 1200  # RFC 9000, 14.1
_SERVER = "testbed"
CONGESTION = "cubic"
_PKTINFO = 8  # IP_PKTINFO of linux/in.h, which socket does not name before 3.14


class QuicStream(Stream):
    """The stream of one QUIC connection, or of the first of several."""

    def __init__(self, connection: Connection | Bundle) -> None:
        super().__init__()
        self.connection = connection

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        self.connection.write(pieces, deadline)

    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        what = "no whole frame arrived" if whole else "nothing arrived"
        return self.connection.read_into(buffer, deadline, what)

    @property
    def rtt_s(self) -> float:
        return self.connection.least_rtt_s

    def stats(self) -> Stats:
        """Datagrams with the headers of Ethernet, IP and UDP. Sent again: packets that were declared lost."""
        c = self.connection
        return Stats(c.sent, c.received, c.lost, CONGESTION)

    def acknowledged(self) -> bool:
        return self.connection.confirmed

    def finish(self, timeout: float = 2.0) -> None:
        self.connection.finish(timeout)

    def close(self) -> None:
        self.connection.close()

    def abort(self) -> None:
        self.connection.abort()


class QuicListener(Listener):
    """A socket that takes first datagrams; each connection then has a socket of its own, at the same port and connected to its
    peer, to which the kernel prefers to give what that peer sends."""

    def __init__(self, transport: Quic, address: str) -> None:
        self._transport, self._configuration = transport, transport.configuration(client=False)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # now: before, a port in use would do
        self._socket.setsockopt(socket.IPPROTO_IP, _PKTINFO, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)  # many may begin at once
        self.port = self._socket.getsockname()[1]
        self._known: dict[tuple[str, int], Connection] = {}
        self._groups = Groups(transport.count)
        self._pending = Pending[Connection](_MOST_PENDING * transport.count, Connection.abort)
        self._complaints = Complaints()
        self._ready: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def accept(self) -> Stream:
        """The next connection whose handshake is done, or so many as are one stream's."""
        stream = self._ready.get()
        if stream is None:
            raise EndpointError("nobody listens any more")
        return stream

    def close(self) -> None:
        """Take no more."""
        with contextlib.suppress(
            OSError
        ):  # of a socket without a peer; whoever waits on it wakes up all the same
            self._socket.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        while True:
            try:
                data, about, _, peer = self._socket.recvmsg(65536, 64)
            except OSError:  # a peer that could not be reached
                continue
            if not data and peer is None:  # shut down
                break
            if (connection := self._known.get(peer)) is not None and connection.alive:
                # Also one whose handshake is done: what came before its socket was there, and is not another one's beginning.
                connection.forward(data, peer)
            elif (moved := self._named(data)) is not None:
                self._known[peer] = moved
                moved.forward(data, peer)
            elif (first := _initial_for(data)) is not None:
                self._take(data, first, _local_address(about), peer)
        self._socket.close()
        self._ready.put(None)

    def _named(self, data: bytes) -> Connection | None:
        """Whose datagram it is that came from an address that nobody had, by the name at its beginning (RFC 9000, 17.3)."""
        name = data[1 : 1 + self._configuration.connection_id_length]
        if not data or data[0] & 0x80:
            return None
        return next((c for c in self._known.values() if c.alive and name in c.names), None)

    def _take(self, data: bytes, destination: bytes, local: str, peer: tuple[str, int]) -> None:
        from qh3.quic.connection import QuicConnection

        quic = QuicConnection(
            configuration=self._configuration, original_destination_connection_id=destination
        )
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((local, self.port))
            sock.connect(peer)
        except OSError:  # gone already
            sock.close()
            return
        self._known = {peer: known for peer, known in self._known.items() if known.alive}
        connection = self._known[peer] = Connection(quic, sock, False, self._transport.lossy)
        connection.trusted = self._transport.secret is None
        self._pending.enter(connection, peer[0])
        connection.start(data)
        threading.Thread(target=self._welcome, args=(connection, peer), daemon=True).start()

    def _welcome(self, connection: Connection, peer: tuple[str, int]) -> None:
        secret, stream = self._transport.secret, None
        patience = _HANDSHAKE_S if secret is None else PATIENCE_S
        until = Deadline(patience)
        try:
            if not connection.established_within(patience):
                raise EndpointError("no handshake in time")
            if secret is not None:
                require_token(secret, lambda rest: connection.read_into(rest, until, "no token came"))
                self._let_in(connection)  # who waits for the others of a bundle is no stranger any more
                connection.trusted = True
            if self._transport.count == 1:
                stream = self._transport.stream(connection)
            elif (bundle := self._groups.joined(connection, until)) is not None:
                stream = self._transport.stream(bundle)
            if secret is None:
                self._let_in(connection)
        except EndpointError as error:
            connection.close()
            if secret is not None:
                self._complaints.say(peer[0], error)
        finally:
            self._pending.leave(connection)
        if stream is not None:
            self._ready.put(stream)

    def _let_in(self, connection: Connection) -> None:
        if not self._pending.leave(connection):
            raise EndpointError("it was given up for others")


def _established(connection: Connection, until: float) -> bool:
    try:
        return connection.established_within(until - time.monotonic())
    except EndpointError:
        if connection.misheard:
            return False
        raise


def _initial_for(data: bytes) -> bytes | None:
    """The connection id that a client's first datagram is for (RFC 8999, 5.1); None: it is none."""
    if len(data) < _SMALLEST_INITIAL or not data[0] & 0x80 or data[5] > 20:
        return None
    return data[6 : 6 + data[5]]


def _local_address(about: list[tuple[int, int, bytes]]) -> str:
    """Where a datagram came to: the local address in struct in_pktinfo (ip(7)), between the interface and the header's."""
    return next(socket.inet_ntoa(data[4:8]) for level, kind, data in about if kind == _PKTINFO)


@dataclass(frozen=True)
class Quic(Transport):
    """One stream of a QUIC connection, encrypted, by qh3 and under its congestion control: CUBIC."""

    name: ClassVar[str] = "quic"
    source: ClassVar[str] = "RFC 9000, 9001, 9002 and 9438"
    keeps_up_bps: ClassVar[float] = 100e6

    def listen(self, address: str = "0.0.0.0", congestion: str | None = None) -> QuicListener:
        """A UDP socket on a port of the kernel's choice, and a certificate made for it."""
        self.prepare()
        return QuicListener(self, address)

    def prepare(self) -> None:
        """Load the library."""
        import qh3.quic.connection  # noqa: F401

    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> Stream:
        """Connect, and be through with the handshake, or with as many at once as there are to be."""
        until, connections = time.monotonic() + timeout, dict[int, Connection]()
        try:
            if not self._establish((address, port), connections, until):
                raise EndpointError(f"no handshake within {timeout:g} s")
            token = self.secret.token if self.secret is not None else b""
            for number, hello in enumerate(hellos(self.count) if self.count > 1 else [b""]):
                if greeting := token + hello:
                    left = Deadline(max(0.0, until - time.monotonic()))
                    connections[number].write([memoryview(greeting)], left)
        except (OSError, EndpointError) as error:
            for connection in connections.values():
                connection.close()
            raise EndpointError(f"no connection to {address}:{port}: {error}") from error
        several = [connections[number] for number in range(self.count)]
        return self.stream(several[0] if self.count == 1 else Bundle(several))

    def _establish(self, peer: tuple[str, int], connections: dict[int, Connection], until: float) -> bool:
        """Have all handshakes done, which run at the same time; False: they were not by then. One that takes long is begun again:
        qh3's client sends no probes (RFC 9002, 6.2.2.1) once all that it sent is confirmed, so where the server's flight is lost
        both can wait for each other. So is one of whose beginning the server had but a probe, which it takes for an error.
        """
        patience, missing = _ATTEMPT_S, list(range(self.count))
        while missing and (left := until - time.monotonic()) > 0:
            for number in missing:
                connections[number] = self._begin(peer)
            attempt = time.monotonic() + min(patience, left)
            missing = [n for n in missing if not _established(connections[n], attempt)]
            for number in missing:
                connections.pop(number).close()
            patience *= 2
        return not missing

    def _begin(self, peer: tuple[str, int]) -> Connection:
        from qh3.quic.connection import QuicConnection

        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.connect(peer)
        except OSError:
            sock.close()
            raise
        quic = QuicConnection(configuration=self.configuration(client=True))
        quic.connect(peer, time.monotonic())
        connection = Connection(quic, sock, True, self.lossy)
        connection.start()
        return connection

    @property
    def count(self) -> int:
        """Connections that a stream has."""
        return 1

    def stream(self, connection: Connection | Bundle) -> Stream:
        """What the connection carries, or several do."""
        return QuicStream(connection)

    def configuration(self, client: bool) -> QuicConfiguration:
        """The library's, for either side."""
        from qh3.quic.configuration import QuicConfiguration

        made = QuicConfiguration(
            is_client=client,
            alpn_protocols=[_PROTOCOL],
            idle_timeout=_IDLE_S,
            initial_rtt=_INITIAL_RTT_S,
            server_name=_SERVER,
            max_datagram_frame_size=_DATAGRAM if self.lossy else None,
            verify_mode=ssl.CERT_NONE,  # whose certificate it is, who made it for this listener knows, and nobody else
        )
        if not client:
            own = self.secret
            made.load_cert_chain(*((own.certificate, own.key) if own else made_certificate()))
        elif self.secret is not None:
            made.assert_fingerprint = self.secret.fingerprint
        return made
