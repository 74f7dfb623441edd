"""Chunks in datagrams of a QUIC connection, any of which may be lost; what else is said, on its stream."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.deadline import Deadline
from testbed.errors import WireError
from testbed.transport import wire
from testbed.transport.bundle import Bundle
from testbed.transport.quic import Quic, QuicStream
from testbed.transport.quic_connection import Connection
from testbed.transport.transport import SEND_S, Bytes, Received, Stream

if TYPE_CHECKING:
    from testbed.transport.protection import Gathering

#: How long chunks that were overtaken by their request's end are waited for, at least; else, half a round trip.
_GRACE_S = 0.02


class DatagramStream(QuicStream):
    """Chunks come as soon as enough of their datagrams have, and never where too few do: behind what was sent, their request's
    end says how many there were. What is missing then is asked for again, which the sender, who waits for its answer, sends.

    loss: the share of datagrams whose loss is made up for; rounds: how often what is missing is asked for.
    """

    lossy: ClassVar[bool] = True

    def __init__(self, connection: Connection | Bundle, loss: float, rounds: int) -> None:
        super().__init__(connection)
        self._loss, self._rounds = loss, rounds
        self._sent: dict[
            int, list[bytes]
        ] = {}  #: datagrams by chunk, of the latest request: an answer to some may come before others are asked for
        self._ending: wire.End | None = None
        self._asked = 0  #: times, for what is missing of the request whose chunks are coming
        self._last: Received | None = None  #: its end, when it was asked
        self._context: Gathering | None = None  #: of the request whose chunks are coming
        self._end: Received | None = None  #: what is held back while chunks may still come
        self._until = 0.0

    def send_chunk(
        self, header: wire.Chunk, payload: Bytes, deadline: Deadline | None = None, priority: int = 0
    ) -> float:
        from testbed.transport.protection import protect

        started = time.monotonic()
        body = memoryview(payload).cast("B")
        frame = b"".join((wire.pack(header, len(body)), body))
        datagrams = protect(header.id, header.index, frame, self._loss, priority)
        self._sent[header.index] = datagrams
        self.connection.send_datagrams(datagrams, deadline or Deadline(SEND_S))
        return started

    def send(self, header: wire.Header, payload: Bytes = b"", deadline: Deadline | None = None) -> float:
        if isinstance(header, wire.Request):
            self._sent.clear()
        elif isinstance(header, wire.End):
            self._ending = header
        return super().send(header, payload, deadline)

    def send_request(
        self, request: wire.Request, chunks: Iterable[Bytes], checked: bool, deadline: Deadline | None = None
    ) -> float:
        """A text, which is small and of no use in part, goes by the stream."""
        if checked:
            return super().send_request(request, chunks, checked, deadline)
        deadline = deadline or Deadline(SEND_S)
        count = length = 0
        started = self.send(request, deadline=deadline)
        for chunk in chunks:
            self.send_chunk(wire.Chunk(request.id, count, False, None), chunk, deadline)
            count, length = count + 1, length + len(memoryview(chunk).cast("B"))
        self.send(wire.End(request.id, count, length), deadline=deadline)
        return started

    def receive(self, max_payload: int, deadline: Deadline, frame_s: float | None = None) -> Received | None:
        while True:
            chunk = self._gather(max_payload)
            if chunk is not None:
                return chunk
            if self._end is not None:
                if not self._lacks(self._end.header):
                    return self._ended()
                if not self.connection.wait_readable(deadline, "no whole request arrived", self._until):
                    if self._asks(deadline):
                        continue
                    return self._ended()
                if self.connection.readable:  # the peer goes on: nothing of this request is under way
                    return self._ended()
                continue
            if self._context is not None:
                self.connection.wait_readable(deadline, "no whole request arrived")
                if not self.connection.readable:
                    continue
            received = super().receive(max_payload, deadline, frame_s)
            if received is None and self._last is not None:  # nobody is there who could send it again
                self._end = self._last
                return self._ended()
            if received is None or not self._holds(received, deadline):
                return received

    def _holds(self, received: Received, deadline: Deadline) -> bool:
        """Take note of a frame that came by the stream; whether it has to wait for chunks, or is nobody else's."""
        from testbed.transport.protection import Gathering

        header = received.header
        if isinstance(header, wire.Missing):
            self._send_again(header, deadline)
            return True
        if isinstance(header, wire.Request):
            self._context, self._asked, self._last = Gathering(header.id), 0, None
        elif isinstance(header, wire.Chunk) and self._context is not None:
            self._context.whole.add(header.index)
        elif isinstance(header, wire.End) and self._context is not None:
            self._end = received
            self._until = time.monotonic() + max(_GRACE_S, self.connection.rtt_s / 2)
            return True
        return False

    def _asks(self, deadline: Deadline) -> bool:
        """Ask for what is missing, once more; False: that was done as often as is to be."""
        if self._asked >= self._rounds or self._end is None or self._context is None:
            return False
        end, self._last, self._end = self._end.header, self._end, None
        assert isinstance(end, wire.End)
        self._asked += 1
        self.send(wire.Missing(self._context.id, self._context.lacks(end.chunks)), deadline=deadline)
        return True

    def _send_again(self, missing: wire.Missing, deadline: Deadline) -> None:
        from testbed.transport.protection import again

        if self._ending is None or missing.id != self._ending.id:
            return
        for lack in missing.lacks:
            if datagrams := self._sent.get(lack.chunk):
                self.connection.send_datagrams(again(datagrams, lack.held, self._loss), deadline)
        self.send(self._ending, deadline=deadline)

    def _lacks(self, end: wire.Header) -> bool:
        assert isinstance(end, wire.End) and self._context is not None
        return len(self._context.whole) < end.chunks

    def _ended(self) -> Received:
        end, self._end, self._context, self._last = self._end, None, None, None
        assert end is not None
        return Received(end.header, end.payload, time.monotonic())

    def _gather(self, max_payload: int) -> Received | None:
        """A chunk that datagrams made whole; before its request is known they wait."""
        if self._context is None:
            return None
        for at, datagram in self.connection.datagrams():
            whole = self._context.take(datagram, max_payload + wire.PREFIX.size + wire.MAX_HEADER)
            if whole is not None:
                return _chunk(self._context.id, *whole, max_payload, at)
        return None


def _chunk(id: int, index: int, frame: bytes, max_payload: int, at: float) -> Received:
    """The frame that datagrams said is a request's chunk. Raises WireError where it is another, or none."""
    prefix = wire.unpack_prefix(frame[: wire.PREFIX.size], max_payload)
    start = wire.PREFIX.size + prefix.header_length
    header, payload = wire.unpack_header(prefix, frame[wire.PREFIX.size : start]), frame[start:]
    if not isinstance(header, wire.Chunk) or (header.id, header.index) != (id, index):
        raise WireError(f"a {type(header).__name__} frame in the datagrams of chunk {index} of a request")
    if len(payload) != prefix.payload_length:
        raise WireError(f"chunk {index} of a request has {len(payload)} bytes of {prefix.payload_length}")
    return Received(header, memoryview(payload), at)


@dataclass(frozen=True)
class Datagram(Quic):
    """Chunks in datagrams (RFC 9221) that may be lost, with repair for losses at the rate `fec`, under the connection's CUBIC."""

    name: ClassVar[str] = "datagram"
    source: ClassVar[str] = "RFC 9221; Reed-Solomon codes as in RFC 5510"
    lossy: ClassVar[bool] = True

    fec: float = 0.02  #: share of datagrams whose loss is made up for, without asking again
    repeats: int = 4  #: times that what is missing all the same is asked for again
    connections: int = 1  #: QUIC connections that datagrams are spread over, each under a CUBIC of its own

    def __post_init__(self) -> None:
        self.require("fec", "from 0 to 0.5", 0 <= self.fec <= 0.5)
        self.require("repeats", "from 0 to 8", 0 <= self.repeats <= 8)
        self.require("connections", "from 1 to 8", 1 <= self.connections <= 8)

    @property
    def count(self) -> int:
        return self.connections

    def stream(self, connection: Connection | Bundle) -> Stream:
        return DatagramStream(connection, self.fec, self.repeats)
