"""Frames: whatever bytes arrive, the decoder answers with a frame or a typed error."""

from __future__ import annotations

import tracemalloc
import zlib

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
        wire.Answer(1, "text", 2, 0.5, 0.0, 0.1, 0.0, 0.2, 0.3, None, 0.0, 9.0, True, 3),
    ],
)
def test_every_kind_of_frame_survives_the_wire(header: wire.Header) -> None:
    assert wire.unpack(wire.pack(header)) == (header, b"")


@given(st.binary(max_size=400))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(data)


@given(st.binary(max_size=300), st.integers(1, 4), st.integers(0, 2**40))
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
