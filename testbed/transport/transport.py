"""What edge and cloud ask of whatever moves their frames: a stream each way, with a bound, a deadline and a count of its bytes.

A transport is one file with a class of each kind below, and one line in `TRANSPORTS`. A stream moves bytes in order; frames are
made of them here, once for all transports. Scenarios write a `Transport` as ``tcp(congestion=bbr, connection=reuse)``.
"""

from __future__ import annotations

import copy
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from testbed import kinds
from testbed.deadline import Deadline
from testbed.errors import WireError
from testbed.transport import wire
from testbed.transport.secret import Secret

#: By name.
TRANSPORTS: dict[str, str] = {
    "tcp": "testbed.transport.tcp:Tcp",
    "quic": "testbed.transport.quic:Quic",
    "datagram": "testbed.transport.datagram:Datagram",
}

SEND_S = (
    60.0  #: in which a frame is handed over where nobody says otherwise: an answer, which fits any buffer
)

#: Who has asked what the clock says may ask again for so long: a run has one connection for that.
CLOCK_S = 3600.0

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Stats:
    """What one connection has cost so far, seen from this side."""

    sent: int  #: bytes on the wire, headers of packets and whatever was sent again included
    received: int  #: the same, as far as it reached this side
    sent_again: int  #: packets that this side sent again
    congestion: str  #: the congestion control that is really used


@dataclass
class Received:
    """A frame, and when its last byte was there (monotonic seconds)."""

    header: wire.Header
    payload: memoryview
    at: float


class Stream(ABC):
    """One connection that carries frames. One thread receives; any may `send`, and `abort`."""

    lossy: ClassVar[bool] = False  #: chunks may come in another order than they were sent in, or not at all

    def __init__(self) -> None:
        self.since = time.monotonic()  #: when the last request began to be waited for
        self.engaged = False  #: whether its header has come, whose context or answer is due
        self.memory: Callable[[int], Bytes] = (
            bytearray  #: where payloads of so many bytes are put as they come
        )
        self._sending = threading.Lock()

    @property
    def rtt_s(self) -> float:
        """Of the shortest round trip so far, as the transport counts it: without what opening it computed; 0: not known."""
        return 0.0

    def hold_back(self, on: bool) -> None:  # noqa: B027
        """Whether `send` waits until the link is about to want more: what is sent next is then decided late. Where a transport
        cannot tell, it changes nothing."""

    def send(self, header: wire.Header, payload: Bytes = b"", deadline: Deadline | None = None) -> float:
        """Send a frame from where it lies; returns when its first byte was handed over (monotonic seconds).

        The whole of it is handed over by the `deadline` (None: in `SEND_S`). Raises EndpointError.
        """
        with self._sending:
            started = time.monotonic()
            self.write(_frame(header, payload), deadline or Deadline(SEND_S))
        return started

    def send_chunk(
        self, header: wire.Chunk, payload: Bytes, deadline: Deadline | None = None, priority: int = 0
    ) -> float:
        """Send a chunk as `send` does, behind its request. priority: how well it is protected where it may be lost; 0: best."""
        return self.send(header, payload, deadline)

    def send_request(
        self, request: wire.Request, chunks: Iterable[Bytes], checked: bool, deadline: Deadline | None = None
    ) -> float:
        """Send a request and its context, each chunk before the next is asked for; returns as `send` does. Raises EndpointError.

        checked: chunks get a checksum, having none of their own. Where `chunks` has a length they are all there, and all frames
        are handed over together, so that none travels in a segment of its own.
        """
        deadline = deadline or Deadline(SEND_S)
        number = len(chunks) if isinstance(chunks, Sized) else None
        count = length = 0
        started, waiting = 0.0, _frame(request)
        for chunk in chunks:
            body = memoryview(chunk).cast("B")
            header = wire.Chunk(request.id, count, count + 1 == number, zlib.crc32(body) if checked else None)
            count, length = count + 1, length + len(body)
            waiting += _frame(header, body)
            if number is None:
                started = started or time.monotonic()
                self.write(waiting, deadline)
                waiting = []
        started = started or time.monotonic()
        self.write([*waiting, *_frame(wire.End(request.id, count, length))], deadline)
        return started

    def receive(self, max_payload: int, deadline: Deadline, frame_s: float | None = None) -> Received | None:
        """The next frame, or None where the peer closed between frames.

        It is whole by the `deadline`; with `frame_s` that is when its first byte is there, and `frame_s` seconds later it is
        whole. Raises WireError for a malformed frame and EndpointError where the connection breaks or time is up.
        """
        if frame_s is not None:
            self.since, self.engaged = time.monotonic(), False
        fixed = memoryview(bytearray(wire.PREFIX.size))
        if not self._fill(fixed[:1], deadline, may_end=True):
            return None
        if frame_s is not None:
            deadline = Deadline(frame_s)
        self._fill(fixed[1:], deadline)
        prefix = wire.unpack_prefix(bytes(fixed), max_payload)
        body = bytearray(prefix.header_length)
        self._fill(memoryview(body), deadline)
        header = wire.unpack_header(prefix, bytes(body))
        self.engaged = True
        payload = memoryview(self.memory(prefix.payload_length))
        self._fill(payload, deadline)
        return Received(header, payload, time.monotonic())

    def receive_request(self, deadline: Deadline, request_s: float) -> tuple[wire.Request, Deadline] | None:
        """The next request, which begins by the `deadline`, and until when all of it must be here: `request_s` seconds later.
        None where the peer closed before it. Raises as `receive` does. Until then, who asks is told what the clock says.
        """
        received = self.receive(0, deadline, request_s)
        while received is not None and isinstance(received.header, wire.Clock):
            self.send(wire.Clocked(received.header.id, received.at, time.monotonic()))
            received = self.receive(0, Deadline(CLOCK_S), request_s)
        if received is None:
            return None
        if not isinstance(received.header, wire.Request):
            raise WireError(f"a {type(received.header).__name__} frame where a request was expected")
        return received.header, Deadline(request_s)

    def receive_context(
        self, request: wire.Request, max_payload: int, deadline: Deadline
    ) -> Iterator[Received]:
        """The chunks of a request's context, of at most so many bytes, and behind them its end, which tells how many there were,
        where some may be missing. Raises as `receive` does."""
        context = wire.Assembly(request, max_payload, self.lossy)
        while (frame := self.receive(context.room, deadline)) is not None:
            whole = context.take(frame.header, frame.payload)
            yield frame
            if whole:
                return
        raise WireError("the connection closed inside a request")

    def _fill(self, buffer: memoryview, deadline: Deadline, may_end: bool = False) -> bool:
        filled = 0
        while filled < len(buffer):
            count = self.read_into(buffer[filled:], deadline, whole=bool(filled) or not may_end)
            if count == 0:
                if may_end and filled == 0:
                    return False
                raise WireError(f"the connection closed inside a frame, {len(buffer) - filled} bytes short")
            filled += count
        return True

    @abstractmethod
    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        """Hand over all of these, in order, by the deadline. Raises EndpointError."""

    @abstractmethod
    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        """Some of what comes next, at least a byte by the deadline; returns how many. 0: the peer has closed.

        whole: inside a frame; says so in the EndpointError that it raises.
        """

    @abstractmethod
    def stats(self) -> Stats:
        """What it has cost so far; behind its end, what it cost."""

    @abstractmethod
    def acknowledged(self) -> bool:
        """Whether the peer has confirmed all that was sent: nothing is under way, nor sent again."""

    def confirm(self) -> None:  # noqa: B027 - where nothing waits there is nothing to do
        """Tell the peer now that what it sent has come, where that would wait for something to go with it."""

    @abstractmethod
    def finish(self, timeout: float = 2.0) -> None:
        """Close in order: say that no more comes, wait until the peer has closed too, so that the last bytes are on the books.

        Where that takes too long, what is not sent yet is given up: it would go on crossing the link beside the next request.
        """

    @abstractmethod
    def close(self) -> None:
        """Close at once."""

    @abstractmethod
    def abort(self) -> None:
        """End the connection, from any thread: whoever waits on it wakes up."""


def _frame(header: wire.Header, payload: Bytes = b"") -> list[memoryview]:
    body = memoryview(payload).cast("B")
    return [memoryview(wire.pack(header, len(body))), body]


class Listener(ABC):
    """Where peers connect to."""

    port: int

    @abstractmethod
    def accept(self) -> Stream:
        """The next peer's stream; waits for one."""

    @abstractmethod
    def close(self) -> None:
        """Take no more."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Transport(kinds.Kind, ABC):
    """A way to move frames. connection: whether each request opens one of its own, or one is kept for all of a link's."""

    lossy: ClassVar[bool] = False  #: whether its streams are
    keeps_up_bps: ClassVar[float]  #: greatest rate of a link that it still fills, on the machine of the docs

    #: who has not the other side's counterpart of it is served nothing, and asked nothing; None: open to all
    secret: ClassVar[Secret | None] = None

    connection: Literal["fresh", "reuse"] = "fresh"

    def closed(self, secret: Secret | None) -> Self:
        """The same, closed to strangers by this side's secret."""
        made = copy.copy(self)
        object.__setattr__(made, "secret", secret)
        return made

    @abstractmethod
    def listen(self, address: str = "0.0.0.0", congestion: str | None = None) -> Listener:
        """Listen on a port of the kernel's choice. congestion: the kernel's control of what this side sends, where the transport
        uses one and names none itself; None: the route's. Raises UsageError where there is none of that name.
        """

    def prepare(self) -> None:
        """Load what connecting needs, so that no request waits for that."""

    @abstractmethod
    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> Stream:
        """Connect. Raises EndpointError where nobody answers, UsageError where the congestion control cannot be had."""


def parse(text: str) -> Transport:
    """The transport that is written so. Raises SpecError."""
    transport: Transport = kinds.parse(text, TRANSPORTS, "transport")
    return transport
