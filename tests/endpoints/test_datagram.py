"""Chunks in datagrams over loopback: what comes, comes once; what is lost is missing, and not waited for."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.deadline import Deadline
from testbed.endpoints.protocol import Serve, TrialResult
from testbed.errors import EndpointError, WireError
from testbed.transport import protection, wire
from testbed.transport.datagram import Datagram, DatagramStream
from testbed.transport.protection import HEADER, SYMBOL
from tests.endpoints.pair import in_this_process
from tests.endpoints.test_every_transport import beside
from tests.endpoints.test_wire import request

Pair = tuple[DatagramStream, DatagramStream]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A client and its server."""
    with Datagram().listen("127.0.0.1") as listener:
        client = Datagram().connect("127.0.0.1", listener.port, None, 10.0)
        server = listener.accept()
    assert isinstance(client, DatagramStream) and isinstance(server, DatagramStream)
    with closing(client), closing(server):
        yield client, server


def filtered(stream: DatagramStream, keep: Callable[[bytes], bool]) -> None:
    """Let only some of a stream's datagrams out."""
    send = stream.connection.send_datagrams

    def some(parcels: Sequence[bytes], deadline: Deadline) -> None:
        send([parcel for parcel in parcels if keep(parcel)], deadline)

    stream.connection.send_datagrams = some  # type: ignore[method-assign]


def send_all(stream: DatagramStream, payloads: Sequence[bytes], id: int = 7) -> None:
    stream.send(request(id=id))
    for index, payload in enumerate(payloads):
        stream.send_chunk(wire.Chunk(id, index, False, None), payload, Deadline(10.0), priority=index)
    stream.send(wire.End(id, len(payloads), sum(map(len, payloads))))


def context(stream: DatagramStream, bound: int = 1 << 22, id: int = 7) -> tuple[dict[int, bytes], wire.End]:
    """What comes of a request's chunks, and its end."""
    begun = stream.receive_request(Deadline(10.0), 10.0)
    assert begun is not None and begun[0].id == id
    *chunks, end = stream.receive_context(*begun[:1], bound, begun[1])
    assert isinstance(end.header, wire.End)
    return {frame.header.index: bytes(frame.payload) for frame in chunks}, end.header  # type: ignore[union-attr]


def test_every_chunk_of_every_request_comes_where_nothing_is_lost(pair: Pair) -> None:
    client, server = pair
    payloads = [os.urandom(n) for n in (0, 1, 300_000, 1200, 2_000_000)]
    for id in (7, 8):
        sending = beside(lambda id=id: send_all(client, payloads, id))
        chunks, end = context(server, id=id)
        assert chunks == dict(enumerate(payloads)) and end.chunks == 5
        sending.join()
        server.send(wire.Failure(id, "heard"))
        answer = client.receive(0, Deadline(5.0))
        assert answer is not None and answer.header == wire.Failure(id, "heard")


def test_what_repair_makes_up_for_comes_and_what_it_does_not_is_missing(pair: Pair) -> None:
    client, server = pair
    lost = {(0, 3), (2, 0), (2, 5), (2, 9)}  # chunk and symbol

    def keep(parcel: bytes) -> bool:
        _, chunk, _, _, symbol = HEADER.unpack_from(parcel)
        return (chunk, symbol) not in lost and (chunk != 1 or symbol > 10)

    filtered(client, keep)
    payloads = [os.urandom(100_000) for _ in range(4)]
    sending = beside(lambda: (send_all(client, payloads), client.receive(0, Deadline(10.0))))
    started = time.monotonic()
    chunks, end = context(server)
    assert set(chunks) | {1, 2} == {0, 1, 2, 3} and 1 not in chunks
    assert all(payloads[index] == chunk for index, chunk in chunks.items()) and end.chunks == 4
    assert time.monotonic() - started < 5
    server.send(wire.Failure(7, "heard"))
    sending.join()


def test_chunks_that_nothing_protects_come_where_nothing_is_lost() -> None:
    bare = Datagram(fec=0.0)
    with bare.listen("127.0.0.1") as listener:
        client = bare.connect("127.0.0.1", listener.port, None, 10.0)
        server = listener.accept()
    assert isinstance(client, DatagramStream) and isinstance(server, DatagramStream)
    with closing(client), closing(server):
        sending = beside(lambda: send_all(client, [bytes(200_000)]))
        assert context(server)[0] == {0: bytes(200_000)}
        sending.join()


@pytest.mark.parametrize("loses", [lambda n: n % 3 == 0, lambda n: n < 250, lambda n: n > 20])
def test_what_is_missing_is_asked_for_and_sent_once_more(pair: Pair, loses: Callable[[int], bool]) -> None:
    client, server = pair
    offered = 0

    def keep(parcel: bytes) -> bool:
        nonlocal offered
        offered += 1
        return not loses(offered) or again.is_set()

    again = threading.Event()
    filtered(client, keep)
    payloads = [os.urandom(n) for n in (100_000, 1, 300_000, 0)]

    def sends() -> None:
        send_all(client, payloads)
        again.set()
        answer = client.receive(0, Deadline(10.0))  # in which it sends once more
        assert answer is not None and answer.header == wire.Failure(7, "heard")

    sending = beside(sends)
    chunks, end = context(server)
    assert chunks == dict(enumerate(payloads)) and end.chunks == 4
    first = -(-400_001 // SYMBOL)
    assert offered < 2 * (first + 40)
    server.send(wire.Failure(7, "heard"))
    sending.join()


def test_what_is_lost_twice_is_missing(pair: Pair) -> None:
    client, server = pair
    filtered(client, lambda parcel: HEADER.unpack_from(parcel)[1] != 1)
    sending = beside(lambda: (send_all(client, [bytes(50_000)] * 3), client.receive(0, Deadline(10.0))))
    chunks, end = context(server)
    assert set(chunks) == {0, 2} and end.chunks == 3
    server.send(wire.Failure(7, "heard"))
    sending.join()


def test_what_is_missing_behind_a_first_token_is_sent_once_more_too(pair: Pair) -> None:
    client, server = pair
    again = threading.Event()
    filtered(client, lambda parcel: HEADER.unpack_from(parcel)[1] != 1 or again.is_set())

    def sends() -> None:
        send_all(client, [bytes(50_000)] * 3)
        again.set()
        assert client.receive(0, Deadline(10.0)) is not None  # of the first chunk
        assert client.receive(0, Deadline(10.0)) is not None

    sending = beside(sends)
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    server.send(wire.FirstToken(7, 1, time.monotonic()))
    *chunks, end = server.receive_context(begun[0], 1 << 22, begun[1])
    assert len(chunks) == 3 and isinstance(end.header, wire.End)
    server.send(wire.Failure(7, "heard"))
    sending.join()


@given(st.integers(0, 400_000), st.data())
def test_of_each_block_as_much_is_sent_again_as_it_lacks(length: int, data: st.DataObject) -> None:
    frame = random.Random(length).randbytes(length)
    datagrams = protection.protect(7, 0, frame, 0.02, 0)
    lost = data.draw(st.sets(st.integers(0, len(datagrams) - 1)))
    gathering = protection.Gathering(7)
    whole = [gathering.take(d, 1 << 20) for n, d in enumerate(datagrams) if n not in lost]
    if not any(whole):
        (lack,) = gathering.lacks(1)
        resent = protection.again(datagrams, lack.held, 0.0)
        assert len(resent) <= len(lost)
        *before, last = [gathering.take(d, 1 << 20) for d in resent]
        assert not any(before) and last == (0, frame)
    assert gathering.lacks(1) == ()


def test_a_whole_context_and_a_text_cross_too(pair: Pair) -> None:
    client, server = pair
    for checked, pieces in ((False, [os.urandom(400_000), b"more"]), (True, [b"a text"])):
        sending = beside(lambda c=checked, p=pieces: client.send_request(request(), p, c))
        assert context(server)[0] == dict(enumerate(pieces))
        sending.join()


def test_datagrams_that_are_no_honest_senders_are_typed_errors(pair: Pair) -> None:
    client, server = pair
    client.send(request())
    client.connection.send_datagrams([HEADER.pack(7, 0, 1 << 31, 0, 0) + bytes(SYMBOL)], Deadline(5.0))
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    with pytest.raises(WireError, match="at most"):
        list(server.receive_context(begun[0], 1000, begun[1]))


def test_a_frame_of_another_kind_in_datagrams_is_refused(pair: Pair) -> None:
    client, server = pair
    client.send(request())
    frame = wire.pack(wire.End(7, 0, 0))
    client.connection.send_datagrams([HEADER.pack(7, 0, len(frame), 0, 0) + frame], Deadline(5.0))
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    with pytest.raises(WireError, match="End frame in the datagrams of chunk 0"):
        list(server.receive_context(begun[0], 1000, begun[1]))


def test_a_request_whose_end_never_comes_ends_with_its_deadline(pair: Pair) -> None:
    client, server = pair
    client.send(request())
    begun = server.receive_request(Deadline(10.0), 0.3)
    assert begun is not None
    with pytest.raises(EndpointError, match=r"no whole request arrived within 0\.3 s"):
        list(server.receive_context(begun[0], 1000, begun[1]))


def test_a_peer_that_ends_inside_a_request_is_an_error(pair: Pair) -> None:
    client, server = pair
    client.send(request())
    begun = server.receive_request(Deadline(10.0), 10.0)
    assert begun is not None
    ending = beside(lambda: client.finish(1.0))
    with pytest.raises(WireError, match="closed inside a request"):
        list(server.receive_context(begun[0], 1000, begun[1]))
    server.finish()
    ending.join()


def test_lost_parts_are_left_out_of_an_answer_and_counted(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = in_this_process(tiny_model("llama"))
    ports = {t: pair.cloud.call(Serve(1 << 22, transport=t), 10) for t in ("tcp", "datagram")}
    protected, lose = protection.protect, set[int]()

    def some(id: int, chunk: int, frame: bytes, loss: float, priority: int) -> list[bytes]:
        return [] if chunk in lose else protected(id, chunk, frame, loss, priority)

    monkeypatch.setattr(protection, "protect", some)

    def ask(transport: str, delivery: str = "stream(chunk=50)") -> TrialResult:
        about = {"transport": transport, "port": ports[transport]}
        return pair.ask("fp16", link=about, delivery=delivery, reuse="none")

    over_tcp = ask("tcp")
    kept = pair.outcome(over_tcp)
    over_datagrams = ask("datagram")
    assert over_datagrams.answer == over_tcp.answer and over_datagrams.tokens_left_out == 0
    assert pair.outcome(over_datagrams).kept_digest == kept.kept_digest
    lose |= {1, 3}
    less = ask("datagram")
    assert less.tokens_left_out == 100
    assert pair.outcome(less).tokens_kept == kept.tokens_kept - 100
    lose |= set(range(100))
    assert ask("datagram").tokens_left_out == kept.tokens_kept
    with pytest.raises(EndpointError, match="1 chunks of a context that is of use as a whole were lost"):
        ask("datagram", "whole")
    lose.clear()
    assert ask("datagram", "whole").answer == over_tcp.answer
