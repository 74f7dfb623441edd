"""A transport of one file: TCP, every byte of it turned over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.deadline import Deadline
from testbed.transport.tcp import Tcp, TcpListener, TcpStream

_TURN = bytes(byte ^ 0xFF for byte in range(256))


class XorStream(TcpStream):
    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        super().write([memoryview(bytes(piece).translate(_TURN)) for piece in pieces], deadline)

    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        count = super().read_into(buffer, deadline, whole)
        buffer[:count] = bytes(buffer[:count]).translate(_TURN)
        return count


class XorListener(TcpListener):
    def accept(self) -> XorStream:
        return XorStream(self.socket.accept()[0])


@dataclass(frozen=True)
class Xor(Tcp):
    name: ClassVar[str] = "xor"

    def listen(self, address: str = "0.0.0.0", congestion: str | None = None) -> XorListener:
        return XorListener(super().listen(address, congestion).socket)

    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> XorStream:
        return XorStream(super().connect(address, port, congestion, timeout).socket)
