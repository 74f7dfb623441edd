"""Frames: whatever bytes arrive, the decoder answers with a frame or a typed error."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.deadline import Deadline
from testbed.errors import WireError
from testbed.transport import wire
from testbed.transport.transport import Stream


class Memory(Stream):
    """What is written is what is read, and then the peer has closed."""

    stats = acknowledged = finish = close = abort = None  # type: ignore[assignment]

    def __init__(self, data: bytes = b"") -> None:
        super().__init__()
        self.data = bytearray(data)

    def write(self, pieces: Sequence[memoryview], deadline: Deadline) -> None:
        for piece in pieces:
            self.data += piece

    def read_into(self, buffer: memoryview, deadline: Deadline, whole: bool) -> int:
        count = min(len(buffer), len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count


def request(**changes: object) -> wire.Request:
    fields = {
        "id": 7,
        "placement": "cloud",
        "codec": "",
        "prefix": "ab",
        "question": "Question: what?\nAnswer:",
        "stop": "\n",
        "max_new_tokens": 16,
    }
    return wire.Request(**{**fields, **changes})  # type: ignore[arg-type]


def sent(context: Iterable[bytes] = (b"some ", b"context")) -> bytes:
    stream = Memory()
    stream.send_request(request(), context, checked=True)
    return bytes(stream.data)


@dataclass
class Arrived:
    request: wire.Request
    chunks: list[memoryview]
    at: float


def arrival(stream: Stream, bound: int, request_s: float = 5.0) -> Arrived | None:
    """The next request with all of its context."""
    begun = stream.receive_request(Deadline(request_s), request_s)
    if begun is None:
        return None
    *chunks, end = stream.receive_context(begun[0], bound, begun[1])
    return Arrived(begun[0], [frame.payload for frame in chunks], end.at)


def received(data: bytes, bound: int = 10_000) -> Arrived | None:
    return arrival(Memory(data), bound)


WORKED = wire.Worked("decode", 0.5, 0.6, 1)


@given(st.lists(st.binary(max_size=500)), st.booleans(), st.text(max_size=200), st.integers(0, 2**40))
def test_a_request_survives_the_wire(context: list[bytes], known: bool, question: str, id: int) -> None:
    stream, asked = Memory(), request(question=question, id=id)
    stream.send_request(asked, context if known else iter(context), checked=known)
    arrived = arrival(stream, sum(map(len, context)))
    assert arrived is not None
    assert arrived.request == asked
    assert arrived.chunks == context
    assert not stream.data


@pytest.mark.parametrize(
    "header",
    [
        wire.FirstToken(id=1, token=5, sent_at=12.5),
        wire.Failure(id=1, message="no"),
        wire.Answer(1, "text", 2, 0.5, (0.4, 0.5), (WORKED,), 0.3, None, 0.0, 9.0, True, 3, 12),
        wire.Receipt(1, 3, 0.5),
        wire.Enough(1),
        wire.Missing(1, (wire.Lack(0, (b"\x01", b"")), wire.Lack(7))),
    ],
)
def test_every_kind_of_answer_survives_the_wire(header: wire.Header) -> None:
    stream = Memory()
    stream.send(header, b"payload")
    frame = stream.receive(7, Deadline(5.0))
    assert frame is not None and (frame.header, frame.payload) == (header, b"payload")


def test_a_chunk_crosses_before_the_next_is_there() -> None:
    stream, crossed = Memory(), list[int]()

    def context() -> Iterator[bytes]:
        for piece in (b"one", b"two"):
            crossed.append(len(stream.data))
            yield piece

    stream.send_request(request(), context(), checked=False)
    assert crossed[0] == 0 < crossed[1] < len(stream.data)


@given(st.binary(min_size=1, max_size=400))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(WireError):
        received(data)


@given(st.binary(max_size=300), st.integers(1, len(wire.KINDS)), st.integers(0, 2**40))
def test_random_bytes_behind_a_valid_start_are_no_frame(data: bytes, kind: int, length: int) -> None:
    fixed = wire.PREFIX.pack(wire.MAGIC, wire.VERSION, kind, 0, len(data), length, 0)[:-4]
    with pytest.raises(WireError):
        received(fixed + zlib.crc32(data, zlib.crc32(fixed)).to_bytes(4, "big") + data)


@given(st.data())
def test_a_truncated_request_is_refused(data: st.DataObject) -> None:
    whole = sent()
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(WireError, match="closed inside a"):
        received(whole[:cut])


@given(st.data())
def test_a_flipped_bit_is_noticed_wherever_it_is(data: st.DataObject) -> None:
    whole = bytearray(sent())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        received(bytes(whole))


def test_a_frame_that_claims_a_huge_payload_allocates_nothing() -> None:
    begun = sent([])[: -len(wire.pack(wire.End(7, 0, 0)))]
    tracemalloc.start()
    with pytest.raises(WireError, match="at most 1000 are accepted"):
        received(begun + wire.pack(wire.Chunk(7, 0, False, None), 1 << 35), 1000)
    with pytest.raises(WireError, match="at most 0 are accepted"):
        received(wire.pack(request(), 1 << 35), 1000)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_an_oversized_header_is_not_sent() -> None:
    with pytest.raises(WireError):
        wire.pack(wire.Failure(id=1, message="x" * (wire.MAX_HEADER + 1)))


BOUND = 1000


def chunks(pieces: list[bytes]) -> list[tuple[wire.Header, bytes]]:
    """A request's context in frames, as an honest sender has them."""
    frames: list[tuple[wire.Header, bytes]] = [
        (wire.Chunk(7, index, index == len(pieces) - 1, zlib.crc32(piece)), piece)
        for index, piece in enumerate(pieces)
    ]
    return [*frames, (wire.End(7, len(pieces), sum(map(len, pieces))), b"")]


def assembled(frames: list[tuple[wire.Header, bytes]]) -> bytes:
    """What a receiver makes of these frames behind a request."""
    stream = Memory()
    for header, payload in [(request(), b""), *frames]:
        stream.send(header, payload)
    arrived = arrival(stream, BOUND)
    assert arrived is not None
    return b"".join(arrived.chunks)


Pieces = st.lists(st.binary(max_size=60), max_size=12)


@given(Pieces)
def test_chunks_come_together_in_order_however_many_there_are(pieces: list[bytes]) -> None:
    assert assembled(chunks(pieces)) == b"".join(pieces)


@given(Pieces, st.data())
def test_chunks_out_of_order_twice_or_missing_are_refused(pieces: list[bytes], data: st.DataObject) -> None:
    honest = chunks(pieces)
    frames = data.draw(st.lists(st.sampled_from(honest), max_size=2 * len(honest)))
    try:
        context = assembled(frames)
    except WireError:
        return
    assert frames[: len(honest)] == honest and context == b"".join(pieces)


@given(Pieces, st.sampled_from(["id", "index", "crc", "chunks", "length"]), st.integers(0, 2**40), st.data())
def test_a_lie_in_any_frame_is_refused(
    pieces: list[bytes], field: str, lie: int, data: st.DataObject
) -> None:
    frames = chunks(pieces)
    able = [n for n, (header, _) in enumerate(frames) if hasattr(header, field)]
    if not able:
        return
    number = data.draw(st.sampled_from(able))
    header, payload = frames[number]
    changed = msgspec.structs.replace(header, **{field: lie})
    if changed == header:
        return
    frames[number] = (changed, payload)
    with pytest.raises(WireError):
        assembled(frames)


def test_what_follows_the_last_chunk_is_its_requests_end() -> None:
    first, second, end = chunks([b"one", b"two"])
    early = (wire.Chunk(7, 0, True, None), b"one")
    with pytest.raises(WireError, match="nothing but its end"):
        assembled([early, second, end])
    with pytest.raises(WireError, match="Request frame inside"):
        assembled([first, (request(), b"")])


def test_chunks_without_end_stay_within_the_receivers_bounds() -> None:
    context, piece = wire.Assembly(request(), 100_000), bytes(300)
    tracemalloc.start()
    with pytest.raises(WireError, match="more bytes than are accepted"):
        for index in range(1 << 20):
            context.take(wire.Chunk(7, index, False, None), memoryview(bytes(piece)))
    assert tracemalloc.get_traced_memory()[1] < 400_000
    tracemalloc.stop()
    assert context.room < 300
    empty = wire.Assembly(request(), 100)
    with pytest.raises(WireError, match="65536 chunks"):
        for index in range(1 << 20):
            empty.take(wire.Chunk(7, index, False, None), memoryview(b""))


@given(Pieces, st.data())
def test_of_a_lossy_stream_chunks_may_come_in_any_order_or_not_at_all_but_none_twice(
    pieces: list[bytes], data: st.DataObject
) -> None:
    *honest, end = chunks(pieces)
    frames = data.draw(st.lists(st.sampled_from(honest), max_size=2 * len(honest))) if honest else []
    context = wire.Assembly(request(), BOUND, lossy=True)
    seen: list[wire.Header] = []
    last = honest[-1][0] if honest else None
    for header, payload in frames:
        if header in seen:
            with pytest.raises(WireError, match="one that has not come was expected"):
                context.take(header, memoryview(payload))
            return
        assert not context.take(header, memoryview(payload))
        seen.append(header)
    assert last is None or len(seen) <= len(honest)
    assert context.take(end[0], memoryview(b""))


@given(Pieces, st.integers(0, 2**40), st.integers(0, 2**40))
def test_of_a_lossy_stream_an_end_says_no_less_than_has_come(
    pieces: list[bytes], count: int, length: int
) -> None:
    *frames, _ = chunks(pieces)
    context = wire.Assembly(request(), BOUND, lossy=True)
    for header, payload in reversed(frames):
        context.take(header, memoryview(payload))
    came = sum(map(len, pieces))
    fits = (count, length) == (len(pieces), came) or (len(pieces) < count <= 1 << 16 and length >= came)
    if fits:
        assert context.take(wire.End(7, count, length), memoryview(b""))
    else:
        with pytest.raises(WireError, match="a request ends with"):
            context.take(wire.End(7, count, length), memoryview(b""))
