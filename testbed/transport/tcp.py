"""Frames over TCP, with the congestion control that the link asks for, sent from and received into memory once."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.deadline import Deadline
from testbed.errors import EndpointError, UsageError
from testbed.transport.transport import Listener, Stats, Stream, Transport

# struct tcp_info of linux/tcp.h: tcpi_options, _unacked, _total_retrans, _bytes_received, _segs_out, _segs_in, _min_rtt (us),
# _bytes_sent
_INFO = struct.Struct("=5xB18xI72xI24xQII4xI48xQ")
_TIMESTAMPS = 1  #: TCPI_OPT_TIMESTAMPS
#: Of a segment, in front of its data: Ethernet, IPv4 and TCP; and TCP's timestamps, where both sides have them.
_HEADERS, _TIMESTAMP_OPTION = 14 + 20 + 20, 12
_UNKNOWN = 0xFFFFFFFF  #: a round trip that was not timed yet
_PIECE = 1 << 20
_UNSENT = 1 << 16  # bytes that the kernel takes ahead of what the congestion window lets out
_MOST_PIECES = 1024  #: IOV_MAX
_CONGESTION = re.compile(r"[a-z0-9_-]{1,15}")  # TCP_CA_NAME_MAX
_GIVE_UP = struct.pack("ii", 1, 0)  # struct linger: at once, with a reset (socket(7))


class TcpStream(Stream):
    """One TCP connection."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.socket = sock
        self._out = sock.dup()  # whose timeout is the sending thread's own
        self._stats = Stats(0, 0, 0, "")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def hold_back(self, on: bool) -> None:
        """By TCP_NOTSENT_LOWAT, tcp(7)."""
        with contextlib.suppress(OSError):  # where it is closed
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT if on else 0)

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        """The first call carries headers and payload together, so that no header travels in a segment of its own."""
        try:
            self._out.settimeout(deadline.left())
            sent = self._out.sendmsg(pieces[:_MOST_PIECES])
            for piece in pieces:
                rest, sent = piece[sent:], max(0, sent - len(piece))
                if len(rest):
                    self._out.settimeout(deadline.left())
                    self._out.sendall(rest)  # its timeout is that of the whole piece
        except TimeoutError as error:
            raise EndpointError(f"the peer did not take a whole frame within {deadline}") from error
        except OSError as error:
            raise EndpointError(f"the connection broke while sending: {error}") from error

    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        """At most a piece at a time, so that the deadline is looked at."""
        try:
            self.socket.settimeout(deadline.left())
            return self.socket.recv_into(buffer[:_PIECE])
        except TimeoutError as error:
            got = "no whole frame" if whole else "nothing"
            raise EndpointError(f"{got} arrived within {deadline}") from error
        except OSError as error:
            raise EndpointError(f"the connection broke while receiving: {error}") from error

    @property
    def rtt_s(self) -> float:
        """By tcp_info's tcpi_min_rtt."""
        with contextlib.suppress(OSError):  # where it is closed
            microseconds = self._info()[6]
            return 0.0 if microseconds == _UNKNOWN else microseconds / 1e6
        return 0.0

    def _info(self) -> tuple[int, int, int, int, int, int, int, int]:
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        return _INFO.unpack(info.ljust(_INFO.size, b"\0"))

    def stats(self) -> Stats:
        """Bytes of data (sent ones as often as they were sent) and the headers of all segments, as tcp_info counts them.

        Not counted: options that only some segments have (a handshake's, selective acknowledgements), data that came twice.
        """
        with contextlib.suppress(OSError):  # where it is closed
            options, _, again, received, segments_out, segments_in, _, sent = self._info()
            headers = _HEADERS + (_TIMESTAMP_OPTION if options & _TIMESTAMPS else 0)
            congestion = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            self._stats = Stats(
                sent + segments_out * headers,
                received + segments_in * headers,
                again,
                congestion.split(b"\0", 1)[0].decode(),
            )
        return self._stats

    def acknowledged(self) -> bool:
        """By tcp_info's tcpi_unacked."""
        return not self._info()[1]

    def confirm(self) -> None:
        """By TCP_QUICKACK, without which Linux waits for 40 ms (tcp(7))."""
        with contextlib.suppress(OSError):  # where it is closed
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def finish(self, timeout: float = 2.0) -> None:
        """Where it takes too long, the connection is reset."""
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
        self.close()

    def close(self) -> None:
        """Close at once."""
        self.stats()
        self._out.close()
        self.socket.close()

    def abort(self) -> None:
        """End the connection, from any thread: whoever waits on it wakes up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class TcpListener(Listener):
    """A listening socket, whose connections have that congestion control."""

    def __init__(self, sock: socket.socket, congestion: str | None = None) -> None:
        self.socket, self._congestion = sock, congestion
        self.port = sock.getsockname()[1]

    def accepted(self) -> tuple[socket.socket, str]:
        """The next connection, and from where. Raises OSError."""
        sock, peer = self.socket.accept()
        with contextlib.suppress(UsageError):  # it is known by now; the connection may be gone
            set_congestion(sock, self._congestion)  # again, see `Tcp.connect`
        return sock, peer[0]

    def accept(self) -> TcpStream:
        """The next connection."""
        return TcpStream(self.accepted()[0])

    def close(self) -> None:
        """Take no more."""
        self.socket.close()


@dataclass(frozen=True)
class Tcp(Transport):
    """TCP as the kernel has it. congestion: its congestion control; none: the link's, or else the kernel's default."""

    name: ClassVar[str] = "tcp"
    source: ClassVar[str] = "RFC 9293, and Linux' tcp(7)"
    keeps_up_bps: ClassVar[float] = math.inf  # whatever a link has, the kernel fills

    congestion: str = ""

    def __post_init__(self) -> None:
        named = not self.congestion or _CONGESTION.fullmatch(self.congestion) is not None
        self.require("congestion", "a name such as cubic", named)

    def listen(self, address: str = "0.0.0.0", congestion: str | None = None) -> TcpListener:
        """A listening socket on a port of the kernel's choice."""
        congestion = self.congestion or congestion
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            set_congestion(sock, congestion)
            sock.bind((address, 0))
            sock.listen(64)
        except BaseException:
            sock.close()
            raise
        if self.secret is not None:
            from testbed.transport.closed import ClosedTcpListener

            return ClosedTcpListener(sock, self.secret, congestion)
        return TcpListener(sock, congestion)

    def connect(
        self, address: str, port: int, congestion: str | None = None, timeout: float = 60.0
    ) -> TcpStream:
        """Connect, and look what congestion control came of it."""
        congestion = self.congestion or congestion
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            set_congestion(sock, congestion)
            sock.settimeout(timeout)
            sock.connect((address, port))
            set_congestion(sock, congestion)  # again: a route's own takes the place of what was chosen before
        except OSError as error:
            sock.close()
            raise EndpointError(f"no connection to {address}:{port}: {error}") from error
        except BaseException:
            sock.close()
            raise
        stream = self._opened(sock, f"{address}:{port}", timeout)
        if congestion is not None and stream.stats().congestion != congestion:
            stream.close()
            raise UsageError(
                f"congestion control {congestion!r} is not permitted here; this process may use: "
                f"{', '.join(allowed_congestion())}"
            )
        return stream

    def _opened(self, sock: socket.socket, peer: str, timeout: float) -> TcpStream:
        if self.secret is None:
            return TcpStream(sock)
        from testbed.transport.closed import closed

        try:
            return closed(sock, self.secret, True, Deadline(timeout))
        except EndpointError as error:
            raise EndpointError(f"no connection to {peer}: {error}") from error


def set_congestion(sock: socket.socket, name: str | None) -> None:
    """Choose a socket's congestion control; None leaves what the route or the namespace says.

    Raises UsageError where the kernel has none of that name. One that it has but keeps for the privileged is left to the
    route (`congctl`, ip-route(8)), which the network sets; `Tcp.connect` checks what came of it.
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
