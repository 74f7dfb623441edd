"""A transport that holds chunks back until enough have come, or is cut inside of one: TCP otherwise."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

from testbed.deadline import Deadline
from testbed.transport import wire
from testbed.transport.tcp import Tcp, TcpStream
from testbed.transport.transport import Bytes, Received


class HeldStream(TcpStream):
    chunks: int
    cut: int
    enough: threading.Event

    def send(self, header: wire.Header, payload: Bytes = b"", deadline: Deadline | None = None) -> float:
        if isinstance(header, wire.Request):
            self.enough.clear()
        if isinstance(header, wire.Chunk) and header.index > self.chunks:
            assert self.enough.wait(20)
        if isinstance(header, wire.Chunk) and header.index == self.cut - 1:
            frame = memoryview(wire.pack(header, len(payload)) + bytes(payload))
            self.write([frame[: len(frame) // 2]], deadline or Deadline(20))
            self.abort()
        return super().send(header, payload, deadline)

    def receive(self, max_payload: int, deadline: Deadline, frame_s: float | None = None) -> Received | None:
        received = super().receive(max_payload, deadline, frame_s)
        if received is not None and isinstance(received.header, wire.Enough):
            self.enough.set()
        return received


@dataclass(frozen=True)
class Held(Tcp):
    """chunks: the last one that crosses before `Enough` has come, the first being 0; cut: after half of this one, from 1."""

    name: ClassVar[str] = "held"

    chunks: int = 1 << 16
    cut: int = 0

    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> TcpStream:
        stream = HeldStream(super().connect(address, port, congestion, timeout).socket)
        stream.chunks, stream.cut, stream.enough = self.chunks, self.cut, threading.Event()
        return stream
