"""What is QUIC's alone: strangers' datagrams, memory, and what its connections end with."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.transport import quic_path
from testbed.transport.datagram import Datagram
from testbed.transport.quic import Quic
from testbed.transport.quic_path import Path
from tests.endpoints.lossy_proxy import LossyProxy
from tests.endpoints.test_every_transport import LARGE, beside, received
from tests.endpoints.test_wire import request


def test_strangers_datagrams_do_no_harm_to_listener_or_connection() -> None:
    with Quic().listen("127.0.0.1") as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect(("127.0.0.1", listener.port))
        initial = b"\xc0\x00\x00\x00\x01\x08" + os.urandom(1300)
        for data in (b"", b"x", os.urandom(1400), initial, b"\xc0" + bytes(1300), b"\xff" * 1300):
            stranger.send(data)
        client = Quic().connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
        sending = beside(lambda: client.send(request(), LARGE))
        for _ in range(50):
            stranger.send(os.urandom(1300))
        assert received(server).payload == LARGE
        sending.join()
        client.close()
        server.close()


def test_no_more_handshakes_are_begun_than_there_is_room_for() -> None:
    before = threading.active_count()
    with Quic().listen("127.0.0.1") as listener:
        for _ in range(300):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(b"\xc0\x00\x00\x00\x01\x08" + os.urandom(1300), ("127.0.0.1", listener.port))
        time.sleep(0.3)
        assert threading.active_count() - before < 2 * 64 + 10


@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("transport", [Quic(), Datagram(connections=2)], ids=str)
def test_a_connection_whose_first_datagrams_are_lost_is_begun_again(transport: Quic, lost: int) -> None:
    """Behind three, nothing but a probe comes, of which the server can make nothing."""
    with (
        transport.listen("127.0.0.1") as listener,
        LossyProxy(
            listener.port, lambda number, there, count: not number and there and count < lost
        ) as proxy,
    ):
        client = transport.connect("127.0.0.1", proxy.port, timeout=10.0)
        server = listener.accept()
        client.send(request())
        assert received(server).header == request()
        client.close()
        server.close()


class Doubling:
    """A listener's socket that gives its first datagram once more, in place of the next one behind the handshake."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._first: Any = None
        self.handshake_done = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recvmsg(self, *sizes: int) -> Any:
        came = self._socket.recvmsg(*sizes)
        if self._first is None and len(came[0]) > 1:
            self._first = came
        if self.handshake_done and len(came[0]) == 1:
            return self._first
        return came


def test_what_comes_late_of_a_beginning_is_no_other_connections() -> None:
    with Quic().listen("127.0.0.1") as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        doubling = listener._socket = Doubling(listener._socket)  # type: ignore[assignment]
        stranger.sendto(b"x", ("127.0.0.1", listener.port))
        client = Quic().connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
        time.sleep(0.2)  # for the thread that saw to the handshake to end
        doubling.handshake_done = True
        stranger.sendto(b"x", ("127.0.0.1", listener.port))
        time.sleep(0.2)
        client.send(request())
        answered = server.receive(0, Deadline(5.0))
        assert answered is not None and answered.header == request()
        client.close()
        server.close()


def test_a_second_stream_is_refused() -> None:
    with Quic().listen("127.0.0.1") as listener:
        client = Quic().connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
    client.send(request())
    received(server)
    client.connection._quic.send_stream_data(4, b"another")  # type: ignore[attr-defined]
    client.send(request())
    with pytest.raises(EndpointError, match="opened stream 4"):
        while server.receive(0, Deadline(5.0)):
            pass
    client.close()
    server.close()


def test_a_peer_that_nobody_reads_waits_and_loses_nothing() -> None:
    with Quic().listen("127.0.0.1") as listener:
        client = Quic().connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
    payload = os.urandom(24 << 20)  # more than is kept unread
    sending = beside(lambda: client.send(request(), payload))
    time.sleep(1.5)
    assert server.connection._unread < (18 << 20)  # type: ignore[attr-defined]
    assert received(server, len(payload)).payload == payload
    sending.join()
    client.close()
    server.close()


@pytest.mark.parametrize("transport", [Quic(), Datagram(connections=2)], ids=str)
def test_a_client_that_has_another_address_by_now_goes_on_from_there(
    transport: Quic, monkeypatch: pytest.MonkeyPatch
) -> None:
    tellers, moved, move = list[socket.socket](), list[Path](), Path.move

    def changes() -> socket.socket:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        here.setblocking(False)
        tellers.append(there)
        return here

    def gone(path: Path) -> bool:
        return path.changes is not None and path.changes.recv(9) == b"gone"

    def noted(path: Path) -> bool:
        moved.append(path)
        return move(path)

    monkeypatch.setattr(quic_path, "_address_changes", changes)
    monkeypatch.setattr(Path, "gone", gone)
    monkeypatch.setattr(Path, "move", noted)
    with transport.listen("127.0.0.1") as listener:
        client = transport.connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
        for _ in range(3):
            sending = beside(lambda: client.send(request(), LARGE))
            if transport.lossy:  # what is under way then is lost for good
                assert received(server).payload == LARGE
                sending.join()
            for teller in tellers:
                teller.send(b"gone")
            if transport.lossy:
                sending = beside(lambda: client.send(request(), LARGE))
            assert received(server).payload == LARGE
            sending.join()
        sending = beside(lambda: server.send(request(), LARGE))
        assert received(client).payload == LARGE
        sending.join()
        assert len(moved) == 3 * transport.count
        client.close()
        server.close()
    for teller in tellers:
        teller.close()


def test_names_that_no_connection_has_lead_to_none() -> None:
    with Quic().listen("127.0.0.1") as listener:
        client = Quic().connect("127.0.0.1", listener.port, timeout=10.0)
        server = listener.accept()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            name = next(iter(server.connection.names))  # type: ignore[attr-defined]
            for data in (
                b"\x40" + name + os.urandom(1200),
                b"\x40" + name,
                b"\x40" + os.urandom(1200),
                b"\x40",
            ):
                stranger.sendto(data, ("127.0.0.1", listener.port))
        sending = beside(lambda: client.send(request(), LARGE))
        assert received(server).payload == LARGE
        sending.join()
        assert server.connection.path.peer == client.connection.path.socket.getsockname()  # type: ignore[attr-defined]
        client.close()
        server.close()
