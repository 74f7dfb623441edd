"""Frames over TCP, with the congestion control that the link asks for, sent from and received into memory once."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

from testbed.endpoints import wire
from testbed.errors import EndpointError, UsageError, WireError

_TOTAL_RETRANSMITS = struct.Struct("=100xI")  #: tcpi_total_retrans in struct tcp_info, linux/tcp.h
_PIECE = 1 << 20


@dataclass
class Received:
    """A frame, and when its last byte was there (monotonic seconds)."""

    header: wire.Header
    payload: memoryview
    at: float


class Connection:
    """One TCP connection that carries frames. Not shared between threads."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def open(cls, address: str, port: int, congestion: str | None, timeout: float) -> Connection:
        """Connect. Raises EndpointError where nobody answers, UsageError where the kernel lacks the congestion control."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            set_congestion(sock, congestion)
            sock.settimeout(timeout)
            sock.connect((address, port))
        except OSError as error:
            sock.close()
            raise EndpointError(f"no connection to {address}:{port}: {error}") from error
        except BaseException:
            sock.close()
            raise
        connection = cls(sock)
        if congestion is not None and connection.congestion() != congestion:
            connection.close()
            raise UsageError(
                f"congestion control {congestion!r} is not permitted here; this process may use: "
                f"{', '.join(allowed_congestion())}"
            )
        return connection

    def send(self, header: wire.Header, payload: bytes | bytearray | memoryview = b"") -> float:
        """Send a frame from where it lies; returns when its first byte was handed to the socket (monotonic seconds)."""
        body = memoryview(payload).cast("B")
        head = memoryview(wire.pack(header, len(body)))
        started = time.monotonic()
        try:
            # The first call carries header and payload together, so that the header does not travel in a segment of its own.
            sent = self.socket.sendmsg([head, body]) if len(body) else self.socket.send(head)
            if sent < len(head):
                self.socket.sendall(head[sent:])
                sent = len(head)
            if sent - len(head) < len(body):
                self.socket.sendall(body[sent - len(head) :])
        except OSError as error:
            raise EndpointError(f"the connection broke while sending: {error}") from error
        return started

    def receive(self, max_payload: int, timeout: float | None = None) -> Received | None:
        """The next frame, or None where the peer closed between frames. Raises WireError for a malformed frame and
        EndpointError where the connection breaks or nothing arrives for `timeout` seconds."""
        if timeout is not None:
            self.socket.settimeout(timeout)
        fixed = bytearray(wire.PREFIX.size)
        if not self._fill(memoryview(fixed), may_end=True):
            return None
        prefix = wire.unpack_prefix(bytes(fixed), max_payload)
        body = bytearray(prefix.header_length)
        self._fill(memoryview(body))
        header = wire.unpack_header(prefix, bytes(body))
        payload = memoryview(bytearray(prefix.payload_length))
        self._fill(payload)
        return Received(header, payload, time.monotonic())

    def _fill(self, buffer: memoryview, may_end: bool = False) -> bool:
        filled = 0
        while filled < len(buffer):
            try:
                count = self.socket.recv_into(buffer[filled : filled + _PIECE])
            except TimeoutError as error:
                raise EndpointError(f"nothing arrived for {self.socket.gettimeout()} s") from error
            except OSError as error:
                raise EndpointError(f"the connection broke while receiving: {error}") from error
            if count == 0:
                if may_end and filled == 0:
                    return False
                raise WireError(f"the connection closed inside a frame, {len(buffer) - filled} bytes short")
            filled += count
        return True

    def retransmits(self) -> int:
        """Segments that this side has sent again so far (tcp_info's tcpi_total_retrans)."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int(_TOTAL_RETRANSMITS.unpack(info)[0]) if len(info) >= 104 else 0

    def congestion(self) -> str:
        """The congestion control that the kernel really uses on this connection."""
        name = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.split(b"\0", 1)[0].decode()

    def finish(self, timeout: float = 2.0) -> None:
        """Close in order: say that no more comes, wait until the peer has closed too, so that the last bytes are on the books."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(timeout)
            while self.socket.recv(4096):
                pass
        except OSError:
            pass
        self.socket.close()

    def close(self) -> None:
        """Close at once."""
        self.socket.close()


def set_congestion(sock: socket.socket, name: str | None) -> None:
    """Choose a socket's congestion control; None leaves what the route or the namespace says.

    Raises UsageError where the kernel has none of that name. One that it has but keeps for the privileged is left to the
    route (`congctl`, ip-route(8)), which the network sets; `Connection.open` checks what came of it.
    """
    if name is None:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except PermissionError:
        pass
    except OSError as error:
        raise UsageError(
            f"congestion control {name!r}: {error.strerror}; this process may use: {', '.join(allowed_congestion())}"
        ) from error


def allowed_congestion() -> list[str]:
    """What the kernel lets an unprivileged process choose."""
    try:
        with open("/proc/sys/net/ipv4/tcp_allowed_congestion_control", encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


def listen(address: str = "0.0.0.0", congestion: str | None = None) -> socket.socket:
    """A listening socket on a port of the kernel's choice; accepted connections inherit the congestion control."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        set_congestion(sock, congestion)
        sock.bind((address, 0))
        sock.listen(64)
    except BaseException:
        sock.close()
        raise
    return sock
