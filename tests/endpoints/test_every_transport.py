"""What edge and cloud rely on, of every transport, over real sockets on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError, WireError
from testbed.transport import wire
from testbed.transport.secret import secrets
from testbed.transport.transport import TRANSPORTS, Received, Stream, parse
from tests.endpoints.test_wire import request

LARGE = bytes(range(256)) * 12_000  # more than any buffer on the way takes


SEVERAL = "datagram(connections=3)"


@pytest.fixture(params=[*TRANSPORTS, SEVERAL, "tcp, closed"])
def pair(request: Any) -> Iterator[tuple[Stream, Stream]]:
    """A client and its server."""
    name, _, is_closed = request.param.partition(", ")
    serving, asking = secrets() if is_closed else (None, None)
    transport = parse(name).closed(asking)
    with transport.closed(serving).listen("127.0.0.1") as listener:
        client = transport.connect("127.0.0.1", listener.port, None, 10.0)
        server = listener.accept()
    with closing(client), closing(server):
        yield client, server


def beside(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def received(stream: Stream, bound: int = len(LARGE)) -> Received:
    frame = stream.receive(bound, Deadline(20.0))
    assert frame is not None
    return frame


def test_frames_of_any_size_arrive_both_ways_at_once_in_their_order(pair: tuple[Stream, Stream]) -> None:
    payloads = [b"", b"x", LARGE, bytes(1500), LARGE[:99_999]]
    senders = [beside(lambda s=s: [s.send(request(id=i), p) for i, p in enumerate(payloads)]) for s in pair]
    for stream in pair:
        for number, payload in enumerate(payloads):
            frame = received(stream)
            assert (frame.header, frame.payload) == (request(id=number), payload)
    for sender in senders:
        sender.join()


def test_a_peer_that_ends_between_frames_is_no_error_and_inside_one_is(pair: tuple[Stream, Stream]) -> None:
    client, server = pair
    client.send(request())
    client.write([memoryview(wire.pack(request())[:30])], Deadline(5.0))
    ending = beside(lambda: client.finish(1.0))
    received(server)
    with pytest.raises(WireError, match="inside a frame"):
        server.receive(0, Deadline(5.0))
    server.finish()
    ending.join()


def test_both_sides_end_in_order_as_soon_as_the_other_has(pair: tuple[Stream, Stream]) -> None:
    client, server = pair
    client.send(request(), LARGE[:100_000])
    started = time.monotonic()
    ending = beside(client.finish)
    received(server)
    assert server.receive(0, Deadline(5.0)) is None
    server.finish()
    ending.join()
    assert time.monotonic() - started < 1.5  # which neither had to wait for in vain
    there, here = client.stats(), server.stats()
    assert min(there.sent, here.received) > 100_000


def test_silence_ends_with_the_deadline_and_costs_nothing_else(pair: tuple[Stream, Stream]) -> None:
    client, server = pair
    with pytest.raises(EndpointError, match="nothing arrived within"):
        server.receive(0, Deadline(0.05))
    client.send(request())
    assert received(server).header == request()


def test_a_peer_that_takes_nothing_is_given_up_by_the_deadline(pair: tuple[Stream, Stream]) -> None:
    client, _ = pair
    with pytest.raises(EndpointError, match="did not take a whole frame within"):
        client.send(request(), bytes(64 << 20), Deadline(0.5))
    started = time.monotonic()
    client.finish(0.2)
    assert time.monotonic() - started < 2


def test_who_waits_wakes_up_when_the_connection_is_ended_from_elsewhere(pair: tuple[Stream, Stream]) -> None:
    _, server = pair
    threading.Timer(0.1, server.abort).start()
    started = time.monotonic()
    try:
        assert server.receive(0, Deadline(20.0)) is None
    except EndpointError:
        pass
    assert time.monotonic() - started < 5


def test_a_peer_that_is_gone_is_noticed(pair: tuple[Stream, Stream]) -> None:
    client, server = pair
    client.close()
    try:
        assert server.receive(0, Deadline(20.0)) is None
    except EndpointError as error:
        assert "broke" in str(error)


def test_the_bytes_of_a_connection_are_counted_with_their_headers(pair: tuple[Stream, Stream]) -> None:
    client, server = pair
    before = client.stats()
    client.send(request(), LARGE[:1_000_000])
    received(server)
    until = time.monotonic() + 5
    while not client.acknowledged() and time.monotonic() < until:
        time.sleep(0.01)
    assert client.acknowledged()
    there, here = client.stats(), server.stats()
    again = there.sent_again * 1600
    assert 1_000_000 < there.sent - before.sent < 1_100_000 + again
    assert 1_000_000 < here.received < 1_110_000 + again
    assert 0 < there.received < 60_000 and there.congestion


@pytest.mark.parametrize("name", [*TRANSPORTS, SEVERAL])
def test_nobody_listening_is_one_clear_error(name: str) -> None:
    kind = socket.SOCK_STREAM if name == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        if name != "tcp":
            unused.close()  # what is bound takes datagrams
        with pytest.raises(EndpointError, match=f"no connection to 127.0.0.1:{port}"):
            parse(name).connect("127.0.0.1", port, None, 1.0)


@pytest.mark.parametrize("name", [*TRANSPORTS, SEVERAL])
def test_several_connections_at_once_are_each_their_own(name: str) -> None:
    transport = parse(name)
    with transport.listen("127.0.0.1") as listener:
        clients = [transport.connect("127.0.0.1", listener.port, None, 10.0) for _ in range(5)]
        for number, client in enumerate(clients):
            client.send(request(id=number), bytes([number]) * 30_000)
        servers = [listener.accept() for _ in clients]
        frames = [received(server) for server in servers]
        assert sorted(frame.header.id for frame in frames) == list(range(5))
        assert all(set(frame.payload) == {frame.header.id} for frame in frames)
        for server, frame in zip(servers, frames, strict=True):
            server.send(wire.Failure(frame.header.id, "back"))
        for number, client in enumerate(clients):
            assert received(client).header == wire.Failure(number, "back")
    for stream in (*clients, *servers):
        stream.close()
