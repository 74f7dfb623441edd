"""Chunks in datagrams: whatever is lost within what is made up for comes back, and whatever a sender claims stays bounded."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import WireError
from testbed.transport.protection import HEADER, SYMBOL, Gathering, Layout, protect, repairs

BOUND = 1 << 20


def gathered(datagrams: list[bytes], id: int = 7) -> dict[int, bytes]:
    """The chunks that come of them."""
    gathering, frames = Gathering(id), {}
    for datagram in datagrams:
        if (whole := gathering.take(datagram, BOUND)) is not None:
            assert whole[0] not in frames
            frames[whole[0]] = whole[1]
    return frames


@given(st.integers(0, 400_000), st.integers(0, 3), st.sampled_from([0.0, 0.01, 0.05, 0.2]), st.randoms())
def test_any_symbols_of_each_block_as_many_as_it_had_give_the_frame_back(
    length: int, priority: int, loss: float, chance: random.Random
) -> None:
    frame = random.Random(length).randbytes(length)
    datagrams = protect(7, 3, frame, loss, priority)
    chance.shuffle(datagrams)
    layout, left = Layout(length), {}
    for datagram in datagrams:  # as many of each block as are needed, and twice each
        left.setdefault(HEADER.unpack_from(datagram)[3], []).append(datagram)
    kept = [d for block, of in left.items() for d in of[: layout.block(block)[1]] * 2]
    chance.shuffle(kept)
    assert gathered(kept) == {3: frame}
    one_less = [d for block, of in left.items() for d in of[: layout.block(block)[1] - (block == 0)]]
    assert gathered(one_less) == {}


@given(st.integers(1, 10_000_000))
def test_blocks_share_all_symbols_evenly_and_none_is_too_large(length: int) -> None:
    layout = Layout(length)
    blocks = [layout.block(number) for number in range(layout.blocks)]
    assert [first for first, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
    assert sum(count for _, count in blocks) == layout.symbols
    assert max(count for _, count in blocks) - min(count for _, count in blocks) <= 1
    assert max(count for _, count in blocks) <= 128 and layout.size <= SYMBOL
    assert layout.symbols * layout.size >= length > (layout.symbols - 1) * layout.size


def test_blocks_fail_as_seldom_as_their_priority_says() -> None:
    rng = random.Random(1)
    for priority, allowed in ((0, 1e-4), (1, 1e-2), (2, 1e-1)):
        more = repairs(100, 0.05, priority)
        failed = sum(sum(rng.random() < 0.05 for _ in range(100 + more)) > more for _ in range(5000))
        assert failed / 5000 <= 1.5 * allowed + 2e-4
    assert repairs(100, 0.05, 0) > repairs(100, 0.05, 1) > repairs(100, 0.05, 2) == repairs(100, 0.05, 9) > 0
    assert repairs(100, 0.0, 0) == 0
    assert repairs(128, 0.9, 0) == 128  # as many as can be told apart


def test_chunks_come_together_in_any_order_and_another_requests_are_passed_over() -> None:
    frames = {n: random.Random(n).randbytes(n * 50_000 + 1) for n in range(4)}
    datagrams = [d for n, frame in frames.items() for d in protect(7, n, frame, 0.02, n)]
    datagrams += protect(6, 0, b"of yesterday", 0.02, 0)
    random.Random(2).shuffle(datagrams)
    assert gathered(datagrams) == frames


@given(st.lists(st.binary(max_size=200), max_size=60))
def test_random_datagrams_are_refused_or_passed_over(datagrams: list[bytes]) -> None:
    gathering = Gathering(7)
    for datagram in datagrams:
        try:
            assert gathering.take(datagram, BOUND) is None
        except WireError:
            pass


Lies = st.tuples(
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 255),
    st.integers(0, 1400),
)


@given(st.lists(Lies, max_size=200), st.integers(0, 200_000))
def test_lies_about_lengths_blocks_and_symbols_are_typed_errors(
    lies: list[tuple[int, int, int, int, int]], length: int
) -> None:
    honest = protect(7, 0, bytes(length), 0.05, 0)
    gathering = Gathering(7)
    for datagram, (index, claimed, block, symbol, size) in zip(honest * 2, lies, strict=False):
        try:
            gathering.take(HEADER.pack(7, index, claimed, block, symbol) + bytes(size), BOUND)
        except WireError:
            pass
        try:
            gathering.take(datagram, BOUND)
        except WireError:
            pass


def test_memory_stays_within_the_bound_however_many_chunks_are_begun() -> None:
    bound = 100_000
    tracemalloc.start()
    gathering = Gathering(7)
    with pytest.raises(WireError, match="not whole than are accepted"):
        for number in range(1 << 16):
            gathering.take(HEADER.pack(7, number, 100_000, 0, 5) + bytes(Layout(100_000).size), bound)
    with pytest.raises(WireError, match="at most 100000"):
        gathering.take(HEADER.pack(7, 65_535, 100_001, 0, 0) + bytes(SYMBOL), bound)
    assert tracemalloc.get_traced_memory()[1] < 3 * (2 * bound + 256 * SYMBOL)
    small = Gathering(7)
    with pytest.raises(WireError, match="not whole"):
        for number in range(1 << 16):  # of a byte each
            small.take(HEADER.pack(7, number, 2 * SYMBOL, 0, 5) + bytes(SYMBOL), bound)
    tracemalloc.stop()


def test_a_datagram_fits_the_smallest_packet_of_quic_with_acknowledgements_before_it() -> None:
    headers = (
        1 + 8 + 4 + 16 + 3
    )  # a short header with its connection id and number, the cipher's tag, the frame's own header
    largest = max(
        len(d) for length in (1, 999_999, 5 * SYMBOL) for d in protect(7, 0, bytes(length), 0.02, 0)
    )
    assert largest <= 1200 - headers - 40
