"""Frames: whatever bytes arrive, the decoder answers with a frame or a typed error."""

from __future__ import annotations

import tracemalloc
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import WireError
from testbed.transport import wire


def request(payload: bytes, **changes: object) -> wire.Request:
    fields = {
        "id": 7,
        "placement": "cloud",
        "codec": "",
        "prefix": "ab",
        "question": "Question: what?\nAnswer:",
        "stop": "\n",
        "max_new_tokens": 16,
        "payload_crc": zlib.crc32(payload),
    }
    return wire.Request(**{**fields, **changes})  # type: ignore[arg-type]


def frame(payload: bytes = b"some context") -> bytes:
    return wire.pack(request(payload), len(payload)) + payload


@given(st.binary(max_size=2000), st.text(max_size=200), st.integers(0, 2**40))
def test_a_frame_survives_the_wire(payload: bytes, question: str, id: int) -> None:
    sent = request(payload, question=question, id=id)
    header, received = wire.unpack(wire.pack(sent, len(payload)) + payload)
    assert header == sent
    assert received == payload


@pytest.mark.parametrize(
    "header",
    [
        wire.FirstToken(id=1, token=5, sent_at=12.5),
        wire.Failure(id=1, message="no"),
        wire.Chunk(id=1, index=3, last=True, crc=None),
        wire.End(id=1, chunks=4, length=1 << 20),
        wire.Answer(1, "text", 2, 0.5, 0.0, 0.1, 0.0, 0.2, 0.3, None, 0.0, 9.0, True, 3),
    ],
)
def test_every_kind_of_frame_survives_the_wire(header: wire.Header) -> None:
    assert wire.unpack(wire.pack(header)) == (header, b"")


@given(st.binary(max_size=400))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(data)


@given(st.binary(max_size=300), st.integers(1, 6), st.integers(0, 2**40))
def test_random_bytes_behind_a_valid_start_are_no_frame(data: bytes, kind: int, length: int) -> None:
    fixed = wire.PREFIX.pack(wire.MAGIC, wire.VERSION, kind, 0, len(data), length, 0)[:-4]
    with pytest.raises(WireError):
        wire.unpack(fixed + zlib.crc32(data, zlib.crc32(fixed)).to_bytes(4, "big") + data)


@given(st.data())
def test_a_truncated_frame_is_refused(data: st.DataObject) -> None:
    whole = frame()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(WireError):
        wire.unpack(whole[:cut])


@given(st.binary(min_size=1, max_size=50))
def test_bytes_left_over_are_refused(extra: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(frame() + extra)


@given(st.data())
def test_a_flipped_bit_is_noticed_wherever_it_is(data: st.DataObject) -> None:
    whole = bytearray(frame())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        wire.unpack(bytes(whole))


def test_a_frame_that_claims_a_huge_payload_allocates_nothing() -> None:
    head = wire.pack(request(b""), 1 << 35)
    tracemalloc.start()
    with pytest.raises(WireError, match="at most 1000 are accepted"):
        wire.unpack(head, max_payload=1000)
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


def assembled(frames: list[tuple[wire.Header, bytes]]) -> bytes | None:
    """What a receiver makes of these frames; None: it waits for more."""
    context = wire.Assembly(7, BOUND)
    for header, payload in frames:
        if context.take(header, memoryview(payload)):
            return bytes(context.payload())
    return None


Pieces = st.lists(st.binary(max_size=60), max_size=12)


@given(Pieces)
def test_chunks_come_together_in_order_however_many_there_are(pieces: list[bytes]) -> None:
    assert assembled(chunks(pieces)) == b"".join(pieces)


@given(Pieces, st.data())
def test_chunks_out_of_order_twice_or_missing_are_refused(pieces: list[bytes], data: st.DataObject) -> None:
    honest = chunks(pieces)
    frames = data.draw(st.lists(st.sampled_from(honest), max_size=2 * len(honest)))
    whole = b"".join(pieces)
    try:
        got = assembled(frames)
    except WireError:
        return
    assert got is None or (frames[: len(honest)] == honest and got == whole)


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
        assembled([first, (request(b"", id=7), b"")])


def test_chunks_without_end_stay_within_the_receivers_bounds() -> None:
    context, piece = wire.Assembly(7, 100_000), bytes(300)
    tracemalloc.start()
    with pytest.raises(WireError, match="more bytes than are accepted"):
        for index in range(1 << 20):
            context.take(wire.Chunk(7, index, False, None), memoryview(bytes(piece)))
    assert tracemalloc.get_traced_memory()[1] < 400_000
    tracemalloc.stop()
    assert context.room < 300
    empty = wire.Assembly(7, 100)
    with pytest.raises(WireError, match="65536 chunks"):
        for index in range(1 << 20):
            empty.take(wire.Chunk(7, index, False, None), memoryview(b""))
