"""Frames over TCP, with the congestion control that the link asks for, sent from and received into memory once."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from dataclasses import dataclass

from testbed.deadline import Deadline
from testbed.errors import EndpointError, UsageError, WireError
from testbed.transport import wire

_UNACKED = struct.Struct("=24xI")  #: tcpi_unacked in struct tcp_info, linux/tcp.h
_TOTAL_RETRANSMITS = struct.Struct("=100xI")  #: tcpi_total_retrans
_PIECE = 1 << 20
_GIVE_UP = struct.pack("ii", 1, 0)  # struct linger: at once, with a reset (socket(7))
SEND_S = 60.0  #: in which a frame is handed over where nobody says otherwise: an answer, which fits any socket's buffer


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
        self.since = time.monotonic()  #: when the last frame began to be waited for
        self.engaged = False  #: whether a frame's header has come, whose payload or answer is due
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

    def send(
        self,
        header: wire.Header,
        payload: bytes | bytearray | memoryview = b"",
        deadline: Deadline | None = None,
    ) -> float:
        """Send a frame from where it lies; returns when its first byte was handed to the socket (monotonic seconds).

        The whole of it is handed over by the `deadline` (None: in `SEND_S`). Raises EndpointError.
        """
        deadline = deadline or Deadline(SEND_S)
        body = memoryview(payload).cast("B")
        head = memoryview(wire.pack(header, len(body)))
        started = time.monotonic()
        try:
            self.socket.settimeout(deadline.left())
            # The first call carries header and payload together, so that the header does not travel in a segment of its own.
            sent = self.socket.sendmsg([head, body]) if len(body) else self.socket.send(head)
            for piece in (head[sent:], body[max(0, sent - len(head)) :]):
                if len(piece):
                    self.socket.settimeout(deadline.left())
                    self.socket.sendall(piece)  # its timeout is that of the whole piece
        except TimeoutError as error:
            raise EndpointError(f"the peer did not take a whole frame within {deadline}") from error
        except OSError as error:
            raise EndpointError(f"the connection broke while sending: {error}") from error
        return started

    def receive(self, max_payload: int, deadline: Deadline, frame_s: float | None = None) -> Received | None:
        """The next frame, or None where the peer closed between frames.

        It is whole by the `deadline`; with `frame_s` that is when its first byte is there, and `frame_s` seconds later it is
        whole. Raises WireError for a malformed frame and EndpointError where the connection breaks or time is up.
        """
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

    def _fill(self, buffer: memoryview, deadline: Deadline, may_end: bool = False) -> bool:
        filled = 0
        while filled < len(buffer):
            try:
                self.socket.settimeout(deadline.left())
                count = self.socket.recv_into(buffer[filled : filled + _PIECE])
            except TimeoutError as error:
                got = "no whole frame" if filled or not may_end else "nothing"
                raise EndpointError(f"{got} arrived within {deadline}") from error
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

    def acknowledged(self) -> bool:
        """Whether the peer has confirmed all that was sent (tcp_info's tcpi_unacked): nothing is under way, nor sent again."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return len(info) >= _UNACKED.size and not _UNACKED.unpack_from(info)[0]

    def congestion(self) -> str:
        """The congestion control that the kernel really uses on this connection."""
        name = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.split(b"\0", 1)[0].decode()

    def finish(self, timeout: float = 2.0) -> None:
        """Close in order: say that no more comes, wait until the peer has closed too, so that the last bytes are on the books.

        Where that takes too long, what is not sent yet is given up: it would go on crossing the link beside the next request.
        """
        deadline = Deadline(timeout)
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while True:
                self.socket.settimeout(deadline.left())
                if not self.socket.recv(4096):
                    break
        except OSError:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _GIVE_UP)
        self.socket.close()

    def close(self) -> None:
        """Close at once."""
        self.socket.close()

    def abort(self) -> None:
        """End the connection, from any thread: whoever waits on it wakes up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


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
