"""The orchestrator's word to its endpoints: calls and results over any pair of byte streams, such as a process's standard input
and output, which never touch the emulated link.

What is sent is a four-byte length and a MessagePack map: a `Call` one way, a `Result` with its number the other. One call at a
time; what comes of a call that was given up is passed over. What they hold is read as what is expected there, or not at all.
"""

from __future__ import annotations

import functools
import operator
import os
import select
import struct
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Raw

from testbed.deadline import Deadline
from testbed.errors import EndpointError, TestbedError, UsageError

_LENGTH = struct.Struct("!I")
_MAX_MESSAGE = 256 * 1024 * 1024
#: How often, while an answer is waited for, whoever is to give it is looked after.
_LOOK_S = 0.25
_MALFORMED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)

T = TypeVar("T")
Number = Annotated[int, Meta(ge=0)]


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """What the other end is to do."""

    number: Number
    message: Raw


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """What came of it, or why nothing did; `usage`: the user's mistake."""

    number: Number
    result: Raw = Raw(b"\xc0")
    error: str | None = None
    usage: bool = False


def _nobody() -> None:
    """Looks after nothing."""


class Refused(EndpointError):
    """The other end lives, and answered that it could not."""


def pack(value: Any) -> Raw:
    """A value as it is sent."""
    return Raw(msgspec.msgpack.encode(value))


def unpack(data: bytes | Raw, kind: Any, what: str) -> Any:
    """A value of that kind. Raises Refused, naming `what` should have been one, and the place in it that is none."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except _MALFORMED as error:
        raise Refused(f"{what} that cannot be: {str(error)[:200]}") from error


class Stream(Protocol):
    """An open file, pipe or socket."""

    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Channel:
    """One end: reads from one stream and writes to another, which may be the same."""

    def __init__(self, reading: Stream, writing: Stream) -> None:
        self._reading, self._writing = reading, writing
        os.set_blocking(writing.fileno(), False)
        self._number = 0

    @classmethod
    def of_this_process(cls) -> Channel:
        """The end of the process that started this one, over standard input and output; what this one prints from now on goes
        where its complaints go, and there is no more to read."""
        reading, writing = (os.fdopen(os.dup(standard), mode) for standard, mode in ((0, "rb"), (1, "wb")))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        return cls(reading, writing)

    def send(
        self, message: Call | Result, deadline: Deadline | None = None, look: Callable[[], None] = _nobody
    ) -> None:
        """Raises EndpointError where the other end is gone, or has not taken the message by the deadline."""
        body = msgspec.msgpack.encode(message)
        if len(body) > _MAX_MESSAGE:
            raise EndpointError(f"a message of {len(body)} bytes; at most {_MAX_MESSAGE} are accepted")
        data = memoryview(_LENGTH.pack(len(body)) + body)
        deadline = deadline or Deadline(None)
        while data:
            self._await(self._writing, select.POLLOUT, deadline, look)
            try:
                data = data[os.write(self._writing.fileno(), data[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EndpointError(f"the other process is gone ({error.strerror})") from error

    def receive(self, kind: type[T], deadline: Deadline, look: Callable[[], None] = _nobody) -> T:
        """The next message, whole by the deadline. Raises EndpointError where it is not, or is none of its `kind`.

        look: called all the while; what it raises ends the waiting.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline, look))
        if length > _MAX_MESSAGE:
            raise EndpointError(
                f"a message of {length} bytes on the control channel; at most {_MAX_MESSAGE} are accepted"
            )
        try:
            return msgspec.msgpack.decode(self._exactly(length, deadline, look), type=kind)
        except _MALFORMED as error:
            raise EndpointError(f"malformed message on the control channel: {error}") from error

    def _exactly(self, count: int, deadline: Deadline, look: Callable[[], None]) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._await(self._reading, select.POLLIN, deadline, look)
            try:
                piece = os.read(self._reading.fileno(), min(count - len(data), 1 << 20))
            except BlockingIOError:
                continue
            except OSError as error:
                raise EndpointError(f"the control channel broke: {error.strerror}") from error
            if not piece:
                raise EndpointError("the other process closed the control channel")
            data += piece
        return bytes(data)

    def _await(self, stream: Stream, event: int, deadline: Deadline, look: Callable[[], None]) -> None:
        poller = select.poll()
        poller.register(stream, event)
        while True:
            try:
                left = deadline.left()
            except TimeoutError as error:
                raise EndpointError(f"no answer within {deadline}") from error
            # Who looks after nobody, an endpoint between calls, need not wake up.
            every = None if look is _nobody else _LOOK_S
            waits = [1000 * wait for wait in (left, every) if wait is not None]
            if poller.poll(min(waits, default=None)):
                return
            look()

    def call(self, message: Any, kind: Any, timeout: float | None, look: Callable[[], None] = _nobody) -> Any:
        """Send the other end a message, and wait for its answer, which is of that kind.

        Raises EndpointError or UsageError with the other end's own words; Refused also where its answer is of another kind.
        """
        deadline = Deadline(timeout)
        self._number += 1
        self.send(Call(self._number, pack(message)), deadline, look)
        while True:
            answer = self.receive(Result, deadline, look)
            if answer.number == self._number:
                break
            if answer.number > self._number:
                raise EndpointError(f"an answer to call {answer.number} of {self._number}")
        if answer.error is not None:
            raise (UsageError if answer.usage else Refused)(answer.error)
        return unpack(answer.result, kind, "an answer")

    def serve(self, handlers: Mapping[type, Callable[[Any], Any]]) -> None:
        """Answer messages until the other end goes away; `handlers`: by a message's type, a tagged struct.

        What a handler raises is the caller's to see; the process lives on.
        """
        messages: Any = functools.reduce(operator.or_, handlers)
        while True:
            try:
                call = self.receive(Call, Deadline(None))
            except EndpointError:
                return
            try:
                message = unpack(call.message, messages, "a message")
                result = Result(call.number, pack(handlers[type(message)](message)))
            except TestbedError as error:
                result = Result(call.number, error=str(error), usage=isinstance(error, UsageError))
            except (
                Exception
            ) as error:  # a defect of ours: the trial fails with its name, the log has the rest
                traceback.print_exc()
                result = Result(call.number, error=f"{type(error).__name__}: {error}")
            try:
                self.send(result)
            except EndpointError:
                return
