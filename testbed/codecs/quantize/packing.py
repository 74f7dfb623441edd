"""Symbols of four, three and two bits into bytes, as `entropy.pack` says, in one compiled pass over a part."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from testbed.codecs.fast.uniform import OPTIONS

_bytes = types.uint8[::1]


@numba.njit(inline="always")
def _combine_few(symbols: Any, packed: Any, width: Any, shift: Any, start: Any) -> Any:
    """Bytes from `start` on, whose last symbols may be missing."""
    for j in range(start, packed.size):
        byte = 0
        for i in range(8 // width):
            at = i * packed.size + j
            if at < symbols.size:
                byte |= ((int(symbols[at]) >> shift) & ((1 << width) - 1)) << (width * i)
        packed[j] = np.uint8(byte)


@numba.njit(inline="always")
def _spread_few(packed: Any, symbols: Any, width: Any, shift: Any, start: Any) -> Any:
    """The inverse: bits from `shift` up, of symbols whose lower bits are set."""
    for j in range(start, packed.size):
        for i in range(8 // width):
            at = i * packed.size + j
            if at < symbols.size:
                bits = ((int(packed[j]) >> (width * i)) & ((1 << width) - 1)) << shift
                symbols[at] = np.uint8(bits | (int(symbols[at]) & ((1 << shift) - 1)))


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _combine_fours(symbols: Any, packed: Any) -> None:
    n = packed.size
    full = symbols.size - n
    low, high = symbols[:n], symbols[n:]
    for j in range(high.size):
        packed[j] = np.uint8(low[j] | np.uint8(high[j] << np.uint8(4)))
    _combine_few(symbols, packed, 4, 0, full)


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _spread_fours(packed: Any, symbols: Any) -> None:
    n = packed.size
    full = symbols.size - n
    low, high = symbols[:n], symbols[n:]
    for j in range(high.size):
        byte = packed[j]
        low[j] = np.uint8(byte & np.uint8(15))
        high[j] = np.uint8(byte >> np.uint8(4))
    _spread_few(packed, symbols, 4, 0, full)


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _combine_pairs(symbols: Any, packed: Any) -> None:
    n, three = packed.size, np.uint8(3)
    full = max(symbols.size - 3 * n, 0)
    first, second, third = symbols[:n], symbols[n : 2 * n], symbols[2 * n : 3 * n]
    fourth = symbols[3 * n : 3 * n + full]
    for j in range(fourth.size):
        low = np.uint8((first[j] & three) | np.uint8((second[j] & three) << np.uint8(2)))
        high = np.uint8((third[j] & three) | np.uint8((fourth[j] & three) << np.uint8(2)))
        packed[j] = np.uint8(low | np.uint8(high << np.uint8(4)))
    _combine_few(symbols, packed, 2, 0, full)


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _spread_pairs(packed: Any, symbols: Any) -> None:
    n, three = packed.size, np.uint8(3)
    full = max(symbols.size - 3 * n, 0)
    for i in range(4):
        own = symbols[i * n : i * n + full]
        for j in range(full):
            own[j] = np.uint8(np.uint8(packed[j] >> (2 * i)) & three)
    _spread_few(packed, symbols, 2, 0, full)


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _combine_thirds(symbols: Any, packed: Any) -> None:
    """The third bit of each symbol, eight to a byte."""
    n, one = packed.size, np.uint8(1)
    full = max(symbols.size - 7 * n, 0)
    for i in range(8):
        own = symbols[i * n : i * n + full]
        for j in range(full):
            bit = np.uint8(np.uint8(np.uint8(own[j] >> 2) & one) << i)
            packed[j] = bit if i == 0 else np.uint8(packed[j] | bit)
    _combine_few(symbols, packed, 1, 2, full)


@numba.njit(types.void(_bytes, _bytes), **OPTIONS)
def _spread_thirds(packed: Any, symbols: Any) -> None:
    n, four = packed.size, np.uint8(4)
    full = max(symbols.size - 7 * n, 0)
    for i in range(8):
        own = symbols[i * n : i * n + full]
        for j in range(full):
            bit = np.uint8(np.uint8(np.uint8(packed[j] >> i) << 2) & four)
            own[j] = np.uint8(own[j] | bit)
    _spread_few(packed, symbols, 1, 2, full)


@numba.njit(types.void(_bytes, types.int64, _bytes), **OPTIONS)
def pack(symbols: Any, bits: Any, packed: Any) -> None:
    """Symbols of 4, 3 or 2 bits -> bytes, in `packed`, which holds as many as `layout.packed_bytes` says."""
    fours = (symbols.size + 3) // 4
    if bits == 4:
        _combine_fours(symbols, packed)
    else:
        _combine_pairs(symbols, packed[:fours])
    if bits == 3:
        _combine_thirds(symbols, packed[fours:])


@numba.njit(types.void(_bytes, types.int64, _bytes), **OPTIONS)
def unpack(packed: Any, bits: Any, symbols: Any) -> None:
    """The inverse of `pack`."""
    fours = (symbols.size + 3) // 4
    if bits == 4:
        _spread_fours(packed, symbols)
    else:
        _spread_pairs(packed[:fours], symbols)
    if bits == 3:
        _spread_thirds(packed[fours:], symbols)
