"""Datagrams over several connections: merged in any order, with gaps; a connection that is lost is noticed or made up for."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.deadline import Deadline
from testbed.errors import EndpointError, SpecError, WireError
from testbed.transport import bundle as bundle_module
from testbed.transport import protection, quic_connection, wire
from testbed.transport import quic as quic_module
from testbed.transport.bundle import Bundle, hellos
from testbed.transport.datagram import Datagram, DatagramStream
from testbed.transport.protection import HEADER, Layout
from testbed.transport.secret import secrets
from testbed.transport.transport import parse
from tests.endpoints.lossy_proxy import Loses, LossyProxy
from tests.endpoints.test_datagram import context, send_all
from tests.endpoints.test_every_transport import beside, received
from tests.endpoints.test_wire import request

Pair = tuple[DatagramStream, DatagramStream]
COUNT = 4
PAYLOADS = [random.Random(n).randbytes(n) for n in (150_000, 1, 400_000, 0, 60_000)]


def connected(transport: Datagram, port: int, listener: quic_module.QuicListener) -> Pair:
    client = transport.connect("127.0.0.1", port, None, 10.0)
    server = listener.accept()
    assert isinstance(client, DatagramStream) and isinstance(server, DatagramStream)
    return client, server


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A client and its server, `COUNT` connections between them."""
    several = Datagram(connections=COUNT)
    with several.listen("127.0.0.1") as listener:
        client, server = connected(several, listener.port, listener)
    with closing(client), closing(server):
        yield client, server


def several_of(stream: DatagramStream) -> tuple[quic_connection.Connection, ...]:
    assert isinstance(stream.connection, Bundle)
    return stream.connection.connections


def test_the_number_of_connections_is_part_of_what_is_written_and_one_is_not() -> None:
    text = "datagram(fec=0.05, connections=4)"
    assert str(parse(text)) == text and parse(text) == Datagram(fec=0.05, connections=4)
    assert str(parse("datagram(connections=1)")) == "datagram" and Datagram().count == 1
    for wrong in (0, 9):
        with pytest.raises(SpecError, match=r"connections is \d, but must be from 1 to 8"):
            parse(f"datagram(connections={wrong})")


def test_every_chunk_comes_over_several_connections_at_once(pair: Pair) -> None:
    client, server = pair
    for id in (7, 8):
        before = [connection.sent for connection in several_of(client)]
        sending = beside(lambda id=id: (send_all(client, PAYLOADS, id), client.receive(0, Deadline(10.0))))
        chunks, end = context(server, id=id)
        assert chunks == dict(enumerate(PAYLOADS)) and end.chunks == len(PAYLOADS)
        server.send(wire.Failure(id, "heard"))
        sending.join()
        sent = [c.sent - b for c, b in zip(several_of(client), before, strict=True)]
        assert sum(sent) > 600_000 and sorted(sent)[-2] > 10_000  # whose window has room, takes
    assert client.stats().sent == sum(connection.sent for connection in several_of(client)) > 1_200_000


def losing(share: float) -> Loses:
    drawn = random.Random(1)
    return lambda number, there, count: drawn.random() < share


def silent_from(which: int, first: int) -> Loses:
    """One connection's datagrams, both ways, from one of the client's on."""
    gone = threading.Event()

    def loses(number: int, there: bool, count: int) -> bool:
        if number == which and there and count >= first:
            gone.set()
        return number == which and gone.is_set()

    return loses


@pytest.mark.parametrize("loses", [losing(0.03), silent_from(2, 30), silent_from(3, 60)])
def test_what_is_lost_on_the_way_or_with_a_connection_is_made_up_for(loses: Loses) -> None:
    several = Datagram(connections=COUNT)
    with several.listen("127.0.0.1") as listener, LossyProxy(listener.port, loses) as proxy:
        client, server = connected(several, proxy.port, listener)
        with closing(client), closing(server):
            sending = beside(lambda: (send_all(client, PAYLOADS), client.receive(0, Deadline(20.0))))
            chunks, end = context(server)
            assert chunks == dict(enumerate(PAYLOADS)) and end.chunks == len(PAYLOADS)
            server.send(wire.Failure(7, "heard"))
            sending.join()


@pytest.mark.parametrize("at_client", [True, False])
@pytest.mark.parametrize("which", range(COUNT))
def test_a_connection_that_breaks_in_a_request_is_an_error_at_both_sides(
    pair: Pair, at_client: bool, which: int
) -> None:
    client, server = pair
    client.send(request())
    failed: list[EndpointError] = []

    def sends() -> None:
        try:
            for index in range(1000):
                client.send_chunk(wire.Chunk(7, index, False, None), bytes(50_000), Deadline(10.0))
        except EndpointError as error:
            failed.append(error)

    sending = beside(sends)
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    started = time.monotonic()
    several_of(client if at_client else server)[which].close()
    with pytest.raises(EndpointError, match="broke"):
        list(server.receive_context(begun[0], 1 << 26, begun[1]))
    sending.join()
    assert len(failed) == 1 and "broke" in str(failed[0])
    assert time.monotonic() - started < 5
    client.close()


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=4), st.data())
def test_however_symbols_come_over_connections_a_chunk_is_whole_with_enough_of_them(
    lengths: list[int], data: st.DataObject
) -> None:
    """Spread at will, lost, doubled, overtaken, and cut off with a connection: who counts distinct symbols knows what comes."""
    drawn = random.Random(data.draw(st.integers(0, 1 << 32)))
    frames = [drawn.randbytes(length) for length in lengths]
    queues: list[list[bytes]] = [[] for _ in range(data.draw(st.integers(1, 8)))]
    for index, frame in enumerate(frames):
        for datagram in protection.protect(7, index, frame, 0.05, index):
            drawn.choice(queues).append(datagram)
    lost, doubled = data.draw(st.sampled_from([0.0, 0.02, 0.1])), data.draw(st.sampled_from([0.0, 0.3]))
    for queue in queues:
        queue[:] = [d for d in queue for _ in range(1 + (drawn.random() < doubled)) if drawn.random() >= lost]
        for _ in range(len(queue) // 10):
            a, b = drawn.randrange(len(queue)), drawn.randrange(len(queue))
            queue[a], queue[b] = queue[b], queue[a]
    if data.draw(st.booleans()):  # it is dead from then on
        dead = drawn.choice(queues)
        del dead[drawn.randrange(len(dead) + 1) :]
    arriving = []
    while any(queues):
        arriving.append(drawn.choice([queue for queue in queues if queue]).pop(0))

    symbols: dict[tuple[int, int], set[int]] = defaultdict(set)
    gathering, whole = protection.Gathering(7), dict[int, bytes]()
    for datagram in arriving:
        _, index, _, block, symbol = HEADER.unpack_from(datagram)
        symbols[index, block].add(symbol)
        if (made := gathering.take(datagram, 1 << 20)) is not None:
            assert made[0] not in whole
            whole[made[0]] = made[1]
    for index, frame in enumerate(frames):
        layout = Layout(len(frame))
        enough = all(len(symbols[index, n]) >= layout.block(n)[1] for n in range(layout.blocks))
        assert whole.get(index) == (frame if enough else None)
    assert {lack.chunk for lack in gathering.lacks(len(frames))} == set(range(len(frames))) - set(whole)


def test_datagrams_of_all_connections_are_read_in_the_order_in_which_they_came(pair: Pair) -> None:
    client, server = pair
    count = 400
    client.connection.send_datagrams([n.to_bytes(2, "big") * 300 for n in range(count)], Deadline(10.0))
    came: list[tuple[float, bytes]] = []
    until = time.monotonic() + 10
    while len(came) < count and time.monotonic() < until:
        server.connection.wait_readable(Deadline(10.0), "none came")
        time.sleep(0.02)
        came.extend(server.connection.datagrams())
    assert sorted(int.from_bytes(data[:2], "big") for _, data in came) == list(range(count))
    assert [at for at, _ in came[-50:]] == sorted(at for at, _ in came[-50:])


def test_connections_that_nobody_reads_keep_together_what_one_would(pair: Pair) -> None:
    client, server = pair
    for connection in several_of(server):
        assert connection._most_unread == quic_connection._UNREAD // COUNT
        connection._most_unread = 200_000
    with pytest.raises(EndpointError, match="did not take a whole frame"):
        client.connection.send_datagrams([bytes(1100)] * 20_000, Deadline(1.5))
    assert sum(connection._unread for connection in several_of(server)) < COUNT * (200_000 + 64 * 1500)


def test_a_side_of_another_number_is_refused() -> None:
    with Datagram(connections=3).listen("127.0.0.1") as listener:
        client = Datagram(connections=2).connect("127.0.0.1", listener.port, None, 10.0)
        with pytest.raises(EndpointError, match="broke"):
            client.receive(0, Deadline(5.0))
        client.close()
        assert listener._ready.empty()


def test_connections_whose_others_do_not_come_are_dropped_and_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quic_module, "_HANDSHAKE_S", 1.0)
    several = Datagram(connections=3)
    with several.listen("127.0.0.1") as listener:
        lonely = [several._begin(("127.0.0.1", listener.port)) for _ in range(4)]
        greetings = [*hellos(3)[:2], hellos(3)[1], b"\xff" * 18]
        for connection, hello in zip(lonely, greetings, strict=True):
            assert connection.established_within(5.0)
            connection.write([memoryview(hello)], Deadline(5.0))
        client, server = connected(several, listener.port, listener)
        client.send(request())
        assert received(server).header == request()
        started = time.monotonic()
        for connection in lonely:
            with pytest.raises(EndpointError, match="broke"):
                connection.wait_readable(Deadline(5.0), "it was not dropped")
            connection.close()
        assert time.monotonic() - started < 4
        assert not listener._groups._groups
        client.close(), server.close()


def test_streams_that_are_opened_at_once_leave_each_others_connections_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each all but one connection is there before the last one of any comes."""
    monkeypatch.setattr(quic_module, "_MOST_PENDING", 4)
    several = Datagram(connections=3)
    with several.listen("127.0.0.1") as listener:
        peer = ("127.0.0.1", listener.port)
        greetings = [hellos(3) for _ in range(4)]
        opened = []
        for number in range(3):
            for greeting in greetings:
                opened.append(several._begin(peer))
                assert opened[-1].established_within(5.0)
                opened[-1].write([memoryview(greeting[number])], Deadline(5.0))
        servers = [listener.accept() for _ in greetings]
        for stream in (*opened, *servers):
            stream.abort()


def test_each_of_a_closed_paths_connections_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them with another token: then none of them is served."""
    monkeypatch.setattr(quic_module, "PATIENCE_S", 1.0)
    serving, asking = secrets()
    several = Datagram(connections=3).closed(asking)
    with several.closed(serving).listen("127.0.0.1") as listener:
        connections = [several._begin(("127.0.0.1", listener.port)) for _ in range(3)]
        for number, (connection, hello) in enumerate(zip(connections, hellos(3), strict=True)):
            assert connection.established_within(5.0)
            token = os.urandom(len(asking.token)) if number == 1 else asking.token
            connection.write([memoryview(token + hello)], Deadline(5.0))
        for connection in connections:
            with pytest.raises(EndpointError, match="broke"):
                connection.wait_readable(Deadline(10.0), "it was not dropped")
            connection.close()
        assert listener._ready.empty()


def test_a_server_of_another_certificate_gets_none_of_the_tokens() -> None:
    (serving, _), (_, asking) = secrets(), secrets()
    several = Datagram(connections=3)
    with several.closed(serving).listen("127.0.0.1") as listener:
        with pytest.raises(EndpointError, match="no connection"):
            several.closed(asking).connect("127.0.0.1", listener.port, None, 3.0)
        assert listener._ready.empty()


@given(st.binary(max_size=40))
def test_any_bytes_instead_of_a_hello_are_a_typed_error_or_wait_for_the_others(said: bytes) -> None:
    class Saying:
        def __init__(self) -> None:
            self.left = said

        def read_into(self, buffer: memoryview, deadline: Deadline, what: str) -> int:
            count = min(len(buffer), len(self.left))
            buffer[:count], self.left = self.left[:count], self.left[count:]
            return count

    groups = bundle_module.Groups(3)
    with pytest.raises(EndpointError, match="connection"):
        groups.joined(Saying(), Deadline(0.001))  # type: ignore[arg-type]
    assert not groups._groups


def test_a_frame_that_is_no_honest_senders_is_a_typed_error(pair: Pair) -> None:
    client, server = pair
    client.send(request())
    client.connection.send_datagrams([HEADER.pack(7, 0, 1 << 31, 0, 0) + bytes(900)], Deadline(5.0))
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    with pytest.raises(WireError, match="at most"):
        list(server.receive_context(begun[0], 1000, begun[1]))
