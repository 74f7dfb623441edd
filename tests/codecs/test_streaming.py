"""Symbols that are decoded in registers, against the loops that unpack them first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs.fast import batch
from testbed.codecs.fast.threads import bytes_for
from testbed.codecs.layout import lay_out
from testbed.codecs.quantize.integer import INTEGERS
from testbed.codecs.steps import Part


@given(
    bits=st.sampled_from([8, 4, 2]),
    group=st.sampled_from([0, 8, 16, 32, 48]),
    symmetric=st.booleans(),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 9),
    head_dim=st.sampled_from([48, 64, 96]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_symbols_and_scales_decode_to_the_same_values_wherever_they_are_written(
    bits: int, group: int, symmetric: bool, heads: int, tokens: int, head_dim: int, dtype: str, seed: int
) -> None:
    quantizer = INTEGERS[bits](group=group, symmetric=symmetric)
    part = Part(0, "keys", heads, tokens, head_dim, dtype)
    if quantizer.uniform(part) is None:
        return
    random = np.random.default_rng(seed)
    [piece] = lay_out([part], quantizer).pieces
    symbols = random.integers(0, 256, piece.symbol_bytes, dtype=np.uint8)
    side = random.integers(0, 1 << 16, piece.side_bytes // 2, dtype=np.uint16)
    found = []
    for start in (0, 2):  # at a cache line's start, and where whole vectors cannot be written
        values = bytes_for(start + 2 * part.elements)[start:].view(np.uint16)
        table = np.array([batch.row_of(piece, quantizer)])
        addresses = [values.ctypes.data, side.ctypes.data, symbols.ctypes.data]
        table[0, [batch.VALUES, batch.SIDE, batch.PACKED]] = addresses
        fits = batch.decode(dtype, table)
        largest = 0x7C00 if dtype == "float16" else 0x7F80
        nan = (values & 0x7FFF) > largest  # of which there are many
        found.append((fits[0], np.where(nan, 0xFFFF, values)))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("size", [1, 63, 4096, 5 << 20])
def test_memory_begins_at_a_cache_line(size: int) -> None:
    made = bytes_for(size)
    assert made.size == size
    assert made.ctypes.data % 64 == 0
