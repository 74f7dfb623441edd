"""One QUIC connection: a UDP socket and a thread of its own, around qh3's state machine, which knows neither.

That thread alone touches the state machine. What others write it hands over as there is room, and what comes it leaves for them
to read, under one lock.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from testbed import descriptors
from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.transport.quic_path import Address, Path

if TYPE_CHECKING:
    from qh3.quic.connection import QuicConnection

STREAM = 0  #: the one stream that a connection has, which its client opens
#: Of a datagram, in front of its data: Ethernet, IPv4 and UDP.
HEADERS = 14 + 20 + 8
#: So much of what is written lies with the library, unsent: a congestion window of 100 Mbit/s and 20 ms.
_AHEAD = 256 * 1024
_PIECE = 64 * 1024
#: What nobody has read yet; past it, arriving datagrams wait with the kernel, and then they are lost as in any full queue.
_UNREAD = 16 << 20
_OF_EACH = 256  #: what keeping a piece of it costs beside its bytes
_UNTRUSTED = 64 * 1024  #: of datagrams before it is known who sends them
_AT_ONCE = 64  #: datagrams taken from the socket before others are sent


class Connection:
    """See above. Made by who has its socket, which is connected; `start`ed once.

    client: whose connection it is, who opens the stream; that of a server is there when the client's first bytes are. lossy:
    datagrams are taken, too.
    """

    def __init__(self, quic: QuicConnection, sock: socket.socket, client: bool, lossy: bool = False) -> None:
        self.path = Path(sock, client)
        self.names = frozenset({quic.host_cid})  #: of the connection, by which its client may call it
        self.sent = self.received = 0  #: bytes on the wire, headers included
        self.lost = 0  #: packets that were declared lost, whose data was sent again
        self.established = self.ended = False  #: the handshake is done; the peer says that no more comes
        self.error = ""  #: what ended it
        self.misheard = False  #: it was the peer, since what came first was not the first that was sent
        self.trusted = True  #: the peer; else few of its datagrams are kept
        self._quic = quic
        self._changed = threading.Condition()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self._alive = True
        self._open, self._lossy = client, lossy
        self._outgoing: deque[memoryview] = deque()
        self._incoming: deque[memoryview] = deque()
        self._parcels: deque[bytes] = deque()  #: datagrams to be sent, which others may take from, too
        self._handed = 0  #: bytes of one that the library has and has not sent
        self._arrived: deque[tuple[float, bytes]] = deque()  #: datagrams that came, and when
        self._unread, self._most_unread = 0, _UNREAD
        self._heard: Callable[[], None] = lambda: None  #: is told of each change, too
        self._forwarded: deque[tuple[Address, bytes]] = deque()
        self._finishing = self._finished = self._closing = False
        self._confirmed = True
        self._rtt_s = self._least_rtt_s = 0.0
        self._now = 0.0  #: when what is being looked at was taken from the socket
        self._thread = threading.Thread(target=self._run, daemon=True)

    # What any thread may call.

    def start(self, *first: bytes) -> None:
        """Begin to move it. first: datagrams that came before its socket was there."""
        self._forwarded.extend((self.path.peer, data) for data in first)
        self._thread.start()

    def forward(self, data: bytes, peer: Address) -> None:
        """Take a datagram of the peer's that came in by another socket, from that address."""
        with self._changed:
            if len(self._forwarded) < _AT_ONCE:
                self._forwarded.append((peer, data))
        self._rouse()

    def established_within(self, seconds: float) -> bool:
        """Whether the handshake is done by then. Raises EndpointError where it failed."""
        with self._changed:
            return self._await(
                lambda: self.established, Deadline(None), "no handshake", time.monotonic() + seconds
            )

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        """Have all of these taken by the deadline. Raises EndpointError."""
        with self._changed:
            if self.error or self._finishing:
                raise EndpointError(f"the connection broke while sending: {self.error or 'it is closed'}")
            self._outgoing.extend(piece for piece in pieces if len(piece))
            self._confirmed = False
            self._rouse()
            try:
                self._await(lambda: not self._outgoing, deadline, "the peer did not take a whole frame")
            finally:
                self._outgoing.clear()

    def send_datagrams(self, parcels: Sequence[bytes], deadline: Deadline) -> None:
        """Have all of these sent by the deadline, each at most once. Raises EndpointError."""
        with self._changed:
            if self.error or self._finishing:
                raise EndpointError(f"the connection broke while sending: {self.error or 'it is closed'}")
            self._parcels.extend(parcels)
            self._confirmed = False
            self._rouse()
            try:
                sent = lambda: not (self._parcels or self._handed)  # noqa: E731
                self._await(sent, deadline, "the link did not take a whole frame")
            finally:
                self._parcels.clear()

    def join(self, parcels: deque[bytes], heard: Callable[[], None], of: int) -> None:
        """Become one of so many that take the datagrams they send from there, each as it has room. heard: is told, by whoever
        has the lock, of whatever a wait may be for."""
        with self._changed:
            self._parcels, self._heard, self._most_unread = parcels, heard, _UNREAD // of

    def offer(self) -> None:
        """Say that there are datagrams to be sent. Raises EndpointError where none can be."""
        with self._changed:
            if self.error or self._finishing:
                raise EndpointError(f"the connection broke while sending: {self.error or 'it is closed'}")
            self._confirmed = False
            self._rouse()

    def wait_readable(self, deadline: Deadline, what: str, until: float | None = None) -> bool:
        """Wait until a datagram, or something of the stream, is there, or the peer has ended; False where that moment of the
        monotonic clock came first. what: is said where nothing comes by the deadline. Raises EndpointError.
        """
        with self._changed:
            return self._await(
                lambda: bool(self._arrived or self._incoming or self.ended), deadline, what, until
            )

    @property
    def readable(self) -> bool:
        """Whether something of the stream is there, or its end."""
        return bool(self._incoming) or self.ended

    @property
    def arrived_at(self) -> float | None:
        """When the datagram that `datagrams` gives next came; None: there is none."""
        try:
            return self._arrived[0][0]
        except IndexError:
            return None

    @property
    def alive(self) -> bool:
        """Whether it has its socket."""
        return self._alive

    @property
    def carries(self) -> bool:
        """Whether the library has a datagram that is not sent yet."""
        return bool(self._handed)

    def datagrams(self) -> Iterator[tuple[float, bytes]]:
        """Those that have come, each once, and when."""
        while True:
            with self._changed:
                if not self._arrived:
                    return
                at, data = self._arrived.popleft()
                crowded = self._unread >= self._most_unread
                self._unread -= len(data) + _OF_EACH
            if crowded:
                self._rouse()
            yield at, data

    def read_into(self, buffer: memoryview, deadline: Deadline, what: str) -> int:
        """Some of what comes next; 0: the peer has ended. what: is said where nothing comes by the deadline.

        Raises EndpointError.
        """
        with self._changed:
            self._await(lambda: bool(self._incoming) or self.ended, deadline, what)
            if not self._incoming:
                return 0
            piece = self._incoming.popleft()
            count = min(len(piece), len(buffer))
            if count < len(piece):
                self._incoming.appendleft(piece[count:])
            crowded = self._unread >= self._most_unread
            self._unread -= count if count < len(piece) else count + _OF_EACH
        buffer[:count] = piece[:count]
        if crowded:
            self._rouse()
        return count

    @property
    def rtt_s(self) -> float:
        """Of a round trip, smoothed; 0: not known yet."""
        return self._rtt_s

    @property
    def least_rtt_s(self) -> float:
        """Least of those; 0: not known yet."""
        return self._least_rtt_s

    @property
    def confirmed(self) -> bool:
        """Whether the peer has all that was written, and nothing is under way."""
        return self._confirmed

    def finish(self, timeout: float) -> None:
        """End the stream, wait until the peer has ended it too and has all of it, and close; close at once where that takes too
        long."""
        self.end()
        with self._changed, contextlib.suppress(EndpointError):
            self._await(
                lambda: self.ended and self._finished and self._confirmed, Deadline(timeout), "no end"
            )
        self.close()

    def end(self) -> None:
        """End the stream."""
        with self._changed:
            self._finishing = True
            self._rouse()

    def close(self) -> None:
        """Say so to the peer, and end."""
        self._closing = True
        self._rouse()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def abort(self) -> None:
        """End it, and wake up whoever waits on it."""
        self._closing = True
        self._fail("it was ended here")
        self._rouse()

    def _await(
        self, condition: Callable[[], bool], deadline: Deadline, what: str, until: float | None = None
    ) -> bool:
        """Wait, holding the lock, until the condition is true; False where that moment of the monotonic clock came first.

        Raises EndpointError where it can no longer be, or is not by the deadline.
        """
        return waited(
            self._changed,
            condition,
            lambda: self.error and f"the connection broke: {self.error}",
            deadline,
            what,
            until,
        )

    def _rouse(self) -> None:
        with self._changed:
            if self._alive:  # else the number may be another file's by now
                os.eventfd_write(self._eventfd, 1)

    def _fail(self, why: str) -> None:
        with self._changed:
            self.error = self.error or why
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        self._heard()

    # What its own thread does.

    def _run(self) -> None:
        try:
            while not self._closing and not self.error:
                self._send()
                self._wait()
                self._receive()
            if self._closing:
                self._quic.close()
                self._transmit()
        except OSError as error:
            self._fail(str(error.strerror or error))
        except Exception as error:  # of the library: nobody else could tell
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._fail("it is closed")
            self.path.close()
            with self._changed:
                self._alive = False
                os.close(self._eventfd)

    def _send(self) -> None:
        """Hand over what is written, as far as it has room, and send what may be sent now."""
        while self._feed() | self._transmit():
            pass
        with self._changed:
            busy = (
                self._outgoing
                or self._parcels
                or self._handed
                or self._quic.get_send_buffer_size()
                or self._told("bytes_in_flight")
            )
            self._confirmed = not busy
            self._tell()

    def _feed(self) -> bool:
        """The stream first; then datagrams, one at a time, as the library's window has room: what it has it sends when its pacing
        lets it, all at once, whatever the window says by then."""
        if self._feed_stream():
            return True
        if not self.established or self._handed or self._quic.get_send_buffer_size(STREAM):
            return False
        window = self._told("congestion_window") - self._told("bytes_in_flight")
        with self._changed:
            try:
                self._handed = len(self._parcels[0])  # first: whoever waits sees it here or there
                if window < self._handed:
                    self._handed = 0
                    return False
                parcel = self._parcels.popleft()
            except IndexError:  # another has taken it
                self._handed = 0
                return False
            self._quic.send_datagram_frame(parcel)
            self._handed = len(parcel)
        return True

    def _feed_stream(self) -> bool:
        fed = False
        while self._open and self.established:
            room = _AHEAD - self._quic.get_send_buffer_size(STREAM)
            with self._changed:
                if not self._outgoing or room <= 0:
                    break
                piece = self._outgoing[0]
                now = min(len(piece), room, _PIECE)
                self._quic.send_stream_data(STREAM, piece[:now])
                if now < len(piece):
                    self._outgoing[0] = piece[now:]
                else:
                    self._outgoing.popleft()
                fed = True
        if self._finishing and not self._finished and not self._outgoing:
            if self._open and self.established:
                self._quic.send_stream_data(STREAM, b"", end_stream=True)
                fed = True
            self._finished = True
        return fed

    def _transmit(self) -> bool:
        datagrams = self._quic.datagrams_to_send(time.monotonic())
        for data, peer in datagrams:
            if self.path.send(data, peer[:2]):
                self.sent += len(data) + HEADERS
            if len(data) > self._handed:  # it is in this one
                self._handed = 0
        self.path.follow(peer[:2] for _, peer in datagrams)
        return bool(datagrams)

    def _wait(self) -> None:
        timer = self._quic.get_timer()
        seconds = None if timer is None else max(0.0, timer - time.monotonic())
        awaited: list[int | socket.socket] = [self._eventfd]
        if self.path.changes is not None:
            awaited.append(self.path.changes)
        if self._unread < self._most_unread:
            awaited.append(self.path.socket)
        ready = descriptors.ready(awaited, seconds)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        if self.path.changes in ready and self.path.gone() and self.established and self.path.move():
            self._quic.change_connection_id()

    def _receive(self) -> None:
        datagrams: list[tuple[Address, bytes]] = []
        while self._forwarded:
            datagrams.append(self._forwarded.popleft())
        while len(datagrams) < _AT_ONCE and self._unread < self._most_unread:
            if (came := self.path.receive()) is None:
                break
            datagrams.append(came)
        now = self._now = time.monotonic()
        for peer, own in itertools.groupby(datagrams, key=operator.itemgetter(0)):
            batch = [data for _, data in own]
            self.path.heard(peer)
            self.received += sum(map(len, batch)) + HEADERS * len(batch)
            self._quic.receive_many_datagrams(batch, peer, now)
        timer = self._quic.get_timer()
        if timer is not None and timer <= now:
            self._quic.handle_timer(now)
        while (event := self._quic.next_event()) is not None:
            self._take(event)
        self.lost, self._rtt_s = int(self._told("loss_total")), self._told("smoothed_rtt")
        if self._rtt_s:
            self._least_rtt_s = min(self._least_rtt_s or self._rtt_s, self._rtt_s)

    def _take(self, event: object) -> None:
        from qh3.quic import events
        from qh3.quic.packet import QuicErrorCode

        with self._changed:
            if isinstance(event, events.HandshakeCompleted):
                self.established = self.path.lasting = True
            elif isinstance(event, events.StreamDataReceived):
                if event.stream_id == STREAM:
                    self._read(event.data, event.end_stream)
                else:
                    self.error = f"the peer opened stream {event.stream_id}, and there is but one"
            elif isinstance(event, events.DatagramFrameReceived) and self._lossy:
                if not self.trusted and self._unread >= _UNTRUSTED:
                    return  # as if it had been lost
                self._arrived.append((self._now, event.data))
                self._unread += len(event.data) + _OF_EACH
            elif isinstance(event, events.ConnectionIdIssued):
                self.names |= {event.connection_id}
            elif isinstance(event, events.ConnectionIdRetired):
                self.names -= {event.connection_id}
            elif isinstance(event, events.StreamReset):
                self.error = "the peer gave the stream up"
            elif isinstance(event, events.ConnectionTerminated):
                # The latter: of a server that took a later datagram for the first, since it had given the first one's sender up.
                wrong = (QuicErrorCode.PROTOCOL_VIOLATION, QuicErrorCode.TRANSPORT_PARAMETER_ERROR)
                self.misheard = not self.established and event.error_code in wrong
                self.error = self.error or event.reason_phrase or "the peer closed it"
            self._tell()

    def _read(self, data: bytes, ended: bool) -> None:
        self._open = True
        if data:
            self._incoming.append(memoryview(data))
            self._unread += len(data) + _OF_EACH
        self.ended = self.ended or ended

    def _told(self, of: str) -> float:
        """What the library's core says of its state; its facade does not. There is no core before a server's first datagram."""
        return float(getattr(self._quic._core, of, None) or 0)


def waited(
    changed: threading.Condition,
    condition: Callable[[], bool],
    broken: Callable[[], str],
    deadline: Deadline,
    what: str,
    until: float | None,
) -> bool:
    """Wait, holding the lock, until the condition is true; False where that moment of the monotonic clock came first.

    broken: why it can no longer be; then, and where it is not by the deadline, raises EndpointError.
    """
    while not condition():
        if why := broken():
            raise EndpointError(why)
        try:
            left = deadline.left()
        except TimeoutError as error:
            raise EndpointError(f"{what} within {deadline}") from error
        if until is not None:
            soon = until - time.monotonic()
            if soon <= 0:
                return False
            left = soon if left is None else min(left, soon)
        changed.wait(left)
    return True
