"""Frames over real sockets on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError, UsageError, WireError
from testbed.transport import wire
from testbed.transport.tcp import Tcp, TcpStream, set_congestion
from tests.endpoints.test_wire import arrival, request


def pair() -> tuple[TcpStream, TcpStream]:
    listener = Tcp().listen("127.0.0.1")
    with listener:
        client = Tcp().connect("127.0.0.1", listener.port, None, 5.0)
        return client, listener.accept()


def test_a_large_context_arrives_as_it_was_sent_and_with_its_end() -> None:
    client, server = pair()
    context = [bytes(range(256)) * 40_000, b"", *(bytes([n % 256]) for n in range(1500))]
    sender = threading.Thread(target=client.send_request, args=(request(), context, True))
    started = time.monotonic()
    sender.start()
    arrived = arrival(server, sum(map(len, context)), 10.0)
    sender.join()
    assert arrived is not None
    assert arrived.request == request() and arrived.chunks == context
    assert started < arrived.at < time.monotonic()
    client.close()
    server.close()


def test_a_context_larger_than_the_receiver_allows_is_refused_before_it_is_read() -> None:
    client, server = pair()
    client.send_request(request(), [bytes(5), bytes(5)], checked=False)
    with pytest.raises(WireError, match="payload of 5 bytes; at most 2"):
        arrival(server, 7)
    client.close()
    server.close()


def test_a_connection_that_closes_inside_a_frame_is_an_error_and_between_frames_is_not() -> None:
    client, server = pair()
    client.send(request())
    client.socket.sendall(wire.pack(request())[:30])
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
            Tcp().connect("127.0.0.1", port, None, 1.0)


def test_an_unknown_congestion_control_is_named_with_those_that_exist() -> None:
    with socket.socket() as sock, pytest.raises(UsageError, match=r"'vegan'.*may use: .*reno"):
        set_congestion(sock, "vegan")


def test_the_congestion_control_that_was_asked_for_is_used() -> None:
    listener = Tcp().listen("127.0.0.1")
    with listener:
        client = Tcp().connect("127.0.0.1", listener.port, "reno", 5.0)
        assert client.stats().congestion == "reno"
        assert client.stats().sent_again == 0
        client.close()


def test_each_connections_bytes_are_its_own_with_the_headers_of_its_segments() -> None:
    one, other = pair(), pair()
    payload = bytes(1 << 20)
    frame = len(wire.pack(request(), len(payload))) + len(payload)
    sender = threading.Thread(target=one[0].send, args=(request(), payload))
    sender.start()
    assert one[1].receive(len(payload), Deadline(10.0)) is not None
    sender.join()
    for _ in range(100):
        if one[0].acknowledged():
            break
        time.sleep(0.01)
    there, here = one[0].stats(), one[1].stats()
    # The segments of loopback are large; what a busy machine sends again is sent, and arrives once.
    assert frame < here.received < 1.02 * frame
    assert here.received - 2 * 66 <= there.sent < 1.5 * frame
    assert there.received % 66 == 0 < there.received  # acknowledgements alone
    assert other[0].stats().sent <= 2 * 66  # of its handshake
    for stream in (*one, *other):
        stream.close()
    assert one[0].stats().sent == there.sent


def test_what_a_failed_request_had_still_to_send_is_given_up_when_it_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Tcp().connect("127.0.0.1", listener.getsockname()[1], None, 5.0)
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
