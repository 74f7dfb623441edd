"""TCP that is closed to strangers: under TLS 1.3 by OpenSSL, which works between memory and the socket, since one thread reads
while another writes."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from typing import cast

from testbed.deadline import Deadline
from testbed.errors import EndpointError, WireError
from testbed.transport.pending import Pending
from testbed.transport.secret import PATIENCE_S, Complaints, Secret, require_token
from testbed.transport.tcp import TcpListener, TcpStream

_MOST_PENDING = 64
_PIECE = 256 * 1024
_AGAIN_S = 0.1


@functools.lru_cache(maxsize=8)
def _context(secret: Secret, client: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=secret.peer.decode())
    if not client:
        context.num_tickets = 0
    file = os.memfd_create("testbed")  # ssl reads keys from files alone; no disk has this one
    try:
        os.write(file, secret.certificate + secret.key)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return context


class ClosedTcpStream(TcpStream):
    """A TCP connection under TLS. Made by `closed`, which is through with the handshake."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, client: bool) -> None:
        super().__init__(sock)
        self._in, self._encrypted = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._encrypted, server_side=not client)
        self._using = threading.Lock()  # OpenSSL lets one thread at a time use a connection
        self._buffer = memoryview(bytearray(_PIECE))

    def shake_hands(self, pinned: bytes, deadline: Deadline) -> None:
        """Raises EndpointError where the other side is not who has this certificate (PEM)."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush(deadline)
                if not self._fetch(deadline, whole=True):
                    raise EndpointError("it ended inside the handshake") from None
            except ssl.SSLError as error:
                with contextlib.suppress(EndpointError):
                    self._flush(Deadline(1.0))  # the alert
                raise EndpointError(f"no TLS of this run's ({error.reason or error})") from error
        self._flush(deadline)
        if self._tls.getpeercert(binary_form=True) != ssl.PEM_cert_to_DER_cert(pinned.decode()):
            raise EndpointError("another certificate than this run's")

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                with self._using:
                    self._tls.write(piece[start : start + _PIECE])
                if self._encrypted.pending >= _PIECE:
                    self._flush(deadline)
        self._flush(deadline)

    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        while True:
            try:
                with self._using:
                    return cast(int, self._tls.read(len(buffer), buffer))
            except ssl.SSLWantReadError:
                if not self._fetch(deadline, whole):
                    return 0
            except ssl.SSLError as error:
                if error.errno in (ssl.SSL_ERROR_EOF, ssl.SSL_ERROR_ZERO_RETURN):
                    return 0
                raise WireError(f"what arrived is no TLS of this connection's ({error.reason})") from error

    def _flush(self, deadline: Deadline) -> None:
        """By the one thread that writes: records have to leave in their order."""
        with self._using:
            data = self._encrypted.read()
        if data:
            super().write([memoryview(data)], deadline)

    def _fetch(self, deadline: Deadline, whole: bool) -> int:
        count = super().read_into(self._buffer, deadline, whole)
        with self._using:
            if count:
                self._in.write(self._buffer[:count])
            else:
                self._in.write_eof()
        return count


def closed(sock: socket.socket, secret: Secret, client: bool, deadline: Deadline) -> ClosedTcpStream:
    """The connection's stream, when both sides are who they should be. Raises EndpointError where they are not, and closes it."""
    try:
        stream = ClosedTcpStream(sock, _context(secret, client), client)
    except OSError as error:
        sock.close()
        raise EndpointError(f"it was gone already ({error.strerror})") from error
    try:
        stream.shake_hands(secret.peer, deadline)
        if client:
            stream.write([memoryview(secret.token)], deadline)
        else:
            require_token(secret, lambda rest: stream.read_into(rest, deadline, True))
    except (EndpointError, WireError) as error:
        stream.close()
        raise EndpointError(str(error)) from error
    except BaseException:
        stream.close()
        raise
    return stream


class ClosedTcpListener(TcpListener):
    """Gives those out that have said who they are. Each has a thread of its own until then, and not for long."""

    def __init__(self, sock: socket.socket, secret: Secret, congestion: str | None = None) -> None:
        super().__init__(sock, congestion)
        self._secret = secret
        self._ready: queue.SimpleQueue[TcpStream | None] = queue.SimpleQueue()
        self._pending = Pending[socket.socket](_MOST_PENDING, _hang_up)
        self._complaints = Complaints()
        threading.Thread(target=self._listen, daemon=True).start()

    def accept(self) -> TcpStream:
        stream = self._ready.get()
        if stream is None:
            raise EndpointError("nobody listens any more")
        return stream

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        super().close()

    def _listen(self) -> None:
        while True:
            try:
                sock, peer = self.accepted()
            except OSError:
                if self.socket.fileno() < 0:
                    break
                time.sleep(_AGAIN_S)  # there are too many open files
                continue
            self._pending.enter(sock, peer)
            threading.Thread(target=self._welcome, args=(sock, peer), daemon=True).start()
        self._ready.put(None)

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        stream = None
        try:
            stream = closed(sock, self._secret, False, Deadline(PATIENCE_S))
        except EndpointError as error:
            self._complaints.say(peer, error)
        finally:
            stays = self._pending.leave(sock)
        if stream is not None and stays:
            self._ready.put(stream)
        elif stream is not None:
            stream.close()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
