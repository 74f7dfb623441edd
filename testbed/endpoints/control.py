"""The orchestrator's word to its endpoints: calls and results over a socket pair that never touches the emulated link.

A message is a four-byte length and a MessagePack map. A call is ``{"call": name, "arguments": {…}}``; the answer is
``{"result": …}`` or
``{"error": message, "usage": bool}``. One call at a time.
"""

from __future__ import annotations

import socket
import struct
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from testbed.errors import EndpointError, TestbedError, UsageError

_LENGTH = struct.Struct("!I")
_MAX_MESSAGE = 256 * 1024 * 1024


class Channel:
    """One end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, message: Any) -> None:
        """Raises EndpointError where the other end is gone."""
        body = msgspec.msgpack.encode(message)
        try:
            self.socket.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise EndpointError(f"the other process is gone ({error.strerror})") from error

    def receive(self, timeout: float | None = None) -> Any:
        """The next message. Raises EndpointError at the end of the stream, or when `timeout` seconds pass."""
        self.socket.settimeout(timeout)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _MAX_MESSAGE:
            raise EndpointError(
                f"a message of {length} bytes on the control channel; at most {_MAX_MESSAGE} are accepted"
            )
        try:
            return msgspec.msgpack.decode(self._exactly(length))
        except msgspec.MsgspecError as error:
            raise EndpointError(f"malformed message on the control channel: {error}") from error

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self.socket.recv(min(count - len(data), 1 << 20))
            except TimeoutError as error:
                raise EndpointError(f"no answer within {self.socket.gettimeout():.0f} s") from error
            except OSError as error:
                raise EndpointError(f"the control channel broke: {error.strerror}") from error
            if not piece:
                raise EndpointError("the other process closed the control channel")
            data += piece
        return bytes(data)

    def call(self, name: str, timeout: float | None = None, **arguments: Any) -> Any:
        """Call the other end and wait for its result. Raises EndpointError or UsageError with the other end's message."""
        self.send({"call": name, "arguments": arguments})
        answer = self.receive(timeout)
        if "error" in answer:
            raise (UsageError if answer.get("usage") else EndpointError)(answer["error"])
        return answer["result"]

    def serve(self, handlers: dict[str, Callable[..., Any]]) -> None:
        """Answer calls until the other end goes away. What a handler raises is the caller's to see; the process lives on."""
        while True:
            try:
                message = self.receive()
            except EndpointError:
                return
            try:
                result = handlers[message["call"]](**message["arguments"])
                answer = {"result": result}
            except TestbedError as error:
                answer = {"error": str(error), "usage": isinstance(error, UsageError)}
            except (
                Exception
            ) as error:  # a defect of ours: the trial fails with its name, the log has the rest
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}", "usage": False}
            try:
                self.send(answer)
            except EndpointError:
                return
