"""Frames over real sockets on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import zlib

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError, UsageError, WireError
from testbed.transport import wire
from testbed.transport.tcp import Connection, listen, set_congestion
from tests.endpoints.test_wire import request


def pair() -> tuple[Connection, Connection]:
    listener = listen("127.0.0.1")
    with listener:
        client = Connection.open("127.0.0.1", listener.getsockname()[1], None, 5.0)
        accepted, _ = listener.accept()
    return client, Connection(accepted)


def test_a_large_payload_arrives_as_it_was_sent() -> None:
    client, server = pair()
    payload = memoryview(bytes(range(256)) * 40_000)
    header = request(bytes(payload))
    sender = threading.Thread(target=client.send, args=(header, payload))
    sender.start()
    received = server.receive(len(payload), Deadline(10.0))
    sender.join()
    assert received is not None
    assert received.header == header
    assert zlib.crc32(received.payload) == header.payload_crc
    client.close()
    server.close()


def test_a_frame_larger_than_the_receiver_allows_is_refused_before_it_is_read() -> None:
    client, server = pair()
    client.send(request(b"x" * 100), b"x" * 100)
    with pytest.raises(WireError, match="at most 99"):
        server.receive(99, Deadline(5.0))
    client.close()
    server.close()


def test_a_connection_that_closes_inside_a_frame_is_an_error_and_between_frames_is_not() -> None:
    client, server = pair()
    client.send(request(b""))
    client.socket.sendall(wire.pack(request(b""))[:30])
    client.close()
    assert server.receive(0, Deadline(5.0)) is not None
    with pytest.raises(WireError, match="inside a frame"):
        server.receive(0, Deadline(5.0))
    server.close()
    client, server = pair()
    client.close()
    assert server.receive(0, Deadline(5.0)) is None
    server.close()


def test_silence_ends_after_the_timeout() -> None:
    client, server = pair()
    with pytest.raises(EndpointError, match="nothing arrived"):
        server.receive(0, Deadline(0.05))
    client.close()
    server.close()


def test_nobody_listening_is_one_clear_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(EndpointError, match=f"127.0.0.1:{port}"):
            Connection.open("127.0.0.1", port, None, 1.0)


def test_an_unknown_congestion_control_is_named_with_those_that_exist() -> None:
    with socket.socket() as sock, pytest.raises(UsageError, match=r"'vegan'.*may use: .*reno"):
        set_congestion(sock, "vegan")


def test_the_congestion_control_that_was_asked_for_is_used() -> None:
    listener = listen("127.0.0.1")
    with listener:
        client = Connection.open("127.0.0.1", listener.getsockname()[1], "reno", 5.0)
        assert client.congestion() == "reno"
        assert client.retransmits() == 0
        client.close()


def test_what_a_failed_request_had_still_to_send_is_given_up_when_it_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection.open("127.0.0.1", listener.getsockname()[1], None, 5.0)
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(5)
            connection.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # until neither side has room: nobody reads
                while True:
                    connection.socket.send(bytes(1 << 20))
            connection.finish(timeout=0.2)
            with pytest.raises(ConnectionResetError):  # and not megabytes, and then an end
                while peer.recv(1 << 20):
                    pass
