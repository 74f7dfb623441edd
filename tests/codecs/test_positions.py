from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import cache_format
from testbed.codecs.cache_format import PositionList
from testbed.errors import PayloadError


@given(st.sets(st.integers(0, 5000), max_size=200) | st.sets(st.integers(0, 2**31 - 1), max_size=50))
def test_any_ascending_list_comes_back(found: set[int]) -> None:
    ascending = np.array(sorted(found), dtype=np.int64)
    code, data = cache_format.encode_positions(ascending)
    assert np.array_equal(cache_format.decode_positions(code, len(ascending), memoryview(data)), ascending)
    span = int(ascending[-1] - ascending[0]) if len(ascending) else 0
    assert len(data) <= min(-(-span // 8), 4 * len(ascending))


def test_a_contiguous_range_is_free() -> None:
    assert cache_format.encode_positions(np.arange(57, 2000)) == (
        PositionList(cache_format.CONTIGUOUS, 57, 0),
        b"",
    )


def test_a_quarter_of_the_tokens_costs_a_bit_for_each() -> None:
    chosen = np.sort(np.random.default_rng(0).choice(1024, 256, replace=False))
    assert len(cache_format.encode_positions(chosen)[1]) <= 128


@given(st.integers(0, 4), st.integers(0, 2**31 - 1), st.integers(0, 300), st.binary(max_size=200))
def test_any_bytes_are_ascending_positions_or_a_payload_error(
    code: int, start: int, count: int, data: bytes
) -> None:
    try:
        found = cache_format.decode_positions(PositionList(code, start, len(data)), count, memoryview(data))
    except PayloadError:
        return
    assert len(found) == count
    assert bool((np.diff(found) > 0).all())


def test_a_list_that_is_cut_off_is_refused() -> None:
    code, data = cache_format.encode_positions(np.array([3, 9, 4000]))
    with pytest.raises(PayloadError, match="cut off"):
        cache_format.decode_positions(code, 3, memoryview(data)[:-1])
