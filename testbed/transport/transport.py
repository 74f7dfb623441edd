"""What edge and cloud ask of whatever moves their frames: a stream each way, with a bound, a deadline and a count of its bytes.

A transport is one file with a class of each kind below, and one line in `TRANSPORTS`. A stream moves bytes in order; frames are
made of them here, once for all transports.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.deadline import Deadline
from testbed.errors import UsageError, WireError
from testbed.kinds import load
from testbed.transport import wire

#: By the name that scenarios and rows have.
TRANSPORTS: dict[str, str] = {
    "tcp": "testbed.transport.tcp:Tcp",
}

SEND_S = (
    60.0  #: in which a frame is handed over where nobody says otherwise: an answer, which fits any buffer
)

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
    """One connection that carries frames. Not shared between threads, but for `abort`."""

    def __init__(self) -> None:
        self.since = time.monotonic()  #: when the last request began to be waited for
        self.engaged = False  #: whether its header has come, whose context or answer is due

    def send(self, header: wire.Header, payload: Bytes = b"", deadline: Deadline | None = None) -> float:
        """Send a frame from where it lies; returns when its first byte was handed over (monotonic seconds).

        The whole of it is handed over by the `deadline` (None: in `SEND_S`). Raises EndpointError.
        """
        body = memoryview(payload).cast("B")
        started = time.monotonic()
        self.write([memoryview(wire.pack(header, len(body))), body], deadline or Deadline(SEND_S))
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
        payload = memoryview(bytearray(prefix.payload_length))
        self._fill(payload, deadline)
        return Received(header, payload, time.monotonic())

    def receive_request(
        self, max_payload: int, deadline: Deadline, request_s: float
    ) -> tuple[wire.Request, Received] | None:
        """The next request, and all of its context though it come in chunks; None where the peer closed before it.

        It begins by the `deadline`, and is whole `request_s` seconds later. Raises as `receive` does.
        """
        received = self.receive(max_payload, deadline, request_s)
        if received is None:
            return None
        request = received.header
        if not isinstance(request, wire.Request):
            raise WireError(f"a {type(request).__name__} frame where a request was expected")
        if not request.chunked:
            return request, received
        if len(received.payload):
            raise WireError("a request with a context both in its own frame and in chunks")
        deadline, context = Deadline(request_s), wire.Assembly(request.id, max_payload)
        while (frame := self.receive(context.room, deadline)) is not None:
            if context.take(frame.header, frame.payload):
                return request, Received(request, context.payload(), frame.at)
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


class Transport(ABC):
    """A way to move frames."""

    name: ClassVar[str]

    @abstractmethod
    def listen(self, address: str = "0.0.0.0", congestion: str | None = None) -> Listener:
        """Listen on a port of the kernel's choice. congestion: the control of what this side sends; None: the route's.

        Raises UsageError where there is none of that name.
        """

    @abstractmethod
    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> Stream:
        """Connect. Raises EndpointError where nobody answers, UsageError where the congestion control cannot be had."""


def find(name: str) -> Transport:
    """The transport of that name. Raises UsageError."""
    if name not in TRANSPORTS:
        raise UsageError(f"transport {name!r}: unknown; there is {', '.join(TRANSPORTS)}")
    transport: Transport = load(TRANSPORTS[name])()
    return transport
