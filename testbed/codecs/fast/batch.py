"""Parts of a cache in one compiled call: quantized and packed to where they lie in the payload, and back.

A small model's cache is dozens of small parts. What Python does for each of them (views, allocations, calls) takes longer
than the arithmetic, so the loops of `uniform` and `streaming` are given a table of addresses, a row a part.
"""

from __future__ import annotations

import inspect
import zlib
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from testbed.codecs.fast import uniform
from testbed.codecs.quantize import packing, streaming
from testbed.codecs.steps import Piece

if TYPE_CHECKING:
    from testbed.codecs.quantize.integer import Integer

Table = npt.NDArray[np.int64]
#: What a row says. Addresses first: of 16-bit values, of scales and zero points, of packed symbols.
VALUES, SIDE, PACKED, _PACKED_BYTES, ROWS, GROUPS, SIZE, BITS, _SYMMETRIC, _LEVELS, OFFSET = range(11)


def row_of(piece: Piece, integer: Integer) -> list[int]:
    """The row of a part that is quantized token by token in groups of equal size; its addresses are yet to be set."""
    part, groups = piece.part, integer.groups(piece.part)
    shape = (part.kv_heads * part.tokens, groups, part.head_dim // groups)
    settings = (piece.bits, int(integer.symmetric), integer.levels, integer.offset)
    return [0, 0, 0, piece.symbol_bytes, *shape, *settings]


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.int8)(types.int64), generate


@numba.njit(inline="always")
def _bytes_at(address: Any, size: Any) -> Any:
    return numba.carray(_pointer(address), (size,))


@numba.njit(inline="always")
def _halves_at(address: Any, shape: Any) -> Any:
    return _bytes_at(address, 2 * shape[0] * shape[1] * shape[2]).view(np.int16).reshape(shape)


@numba.njit(inline="always")
def _room(table: Any) -> Any:
    """Memory for the symbols of the largest part whose symbols are packed."""
    most = 0
    for i in range(len(table)):
        if table[i, BITS] != 8:
            most = max(most, table[i, ROWS] * table[i, GROUPS] * table[i, SIZE])
    return np.empty(most, dtype=np.int8)


@numba.njit(inline="always")
def _encode(table: Any, worst: Any, one_part: Any) -> Any:
    room = _room(table)
    for i in range(len(table)):
        row = table[i]
        shape = (row[ROWS], row[GROUPS], row[SIZE])
        symmetric, count = row[_SYMMETRIC] != 0, shape[0] * shape[1] * shape[2]
        levels, offset = np.float32(row[_LEVELS]), np.float32(row[OFFSET])
        values = _halves_at(row[VALUES], shape)
        side = _halves_at(row[SIDE], (shape[0], 1 if symmetric else 2, shape[1]))
        packed = _bytes_at(row[PACKED], row[_PACKED_BYTES])
        symbols = packed if row[BITS] == 8 else room[:count]
        worst[i] = one_part(values, symmetric, levels, offset, side, symbols.reshape(shape))
        if row[BITS] != 8:
            packing.pack(symbols.view(np.uint8), row[BITS], packed.view(np.uint8))


@numba.njit(inline="always")
def _decode(table: Any, fits: Any, streamed: Any, one_part: Any) -> Any:
    room = _room(table)
    for i in range(len(table)):
        row = table[i]
        shape, bits = (row[ROWS], row[GROUPS], row[SIZE]), row[BITS]
        symmetric, count = row[_SYMMETRIC] != 0, shape[0] * shape[1] * shape[2]
        levels, offset = np.float32(row[_LEVELS]), np.float32(row[OFFSET])
        side = _halves_at(row[SIDE], (shape[0], 1 if symmetric else 2, shape[1]))
        if streaming.takes(bits, shape, row[VALUES]):
            fits[i] = streamed(row[PACKED], bits, shape, symmetric, levels, offset, side, row[VALUES])
            continue
        values = _halves_at(row[VALUES], shape)
        packed = _bytes_at(row[PACKED], count if bits == 8 else row[_PACKED_BYTES])
        symbols = packed if bits == 8 else room[:count]
        if bits != 8:
            packing.unpack(packed.view(np.uint8), bits, symbols.view(np.uint8))
        fits[i] = one_part(symbols.reshape(shape), symmetric, levels, offset, side, values)


_table, _found = types.int64[:, ::1], types.float32[::1]
_loop = numba.njit(types.void(_table, _found), **uniform.OPTIONS)


def _loops(made_of: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The loops that encode and those that decode. made_of: a number that changes with the files that they are made of.

    What numba compiled is kept on disk until the loop's own file changes, or what the loop closes over does: `made_of`.
    """

    @_loop
    def encode_float16(table: Any, worst: Any) -> None:
        assert made_of
        _encode(table, worst, uniform.quantize_float16)

    @_loop
    def encode_bfloat16(table: Any, worst: Any) -> None:
        assert made_of
        _encode(table, worst, uniform.quantize_bfloat16)

    @_loop
    def decode_float16(table: Any, fits: Any) -> None:
        assert made_of
        _decode(table, fits, streaming.dequantize_float16, uniform.dequantize_float16)

    @_loop
    def decode_bfloat16(table: Any, fits: Any) -> None:
        assert made_of
        _decode(table, fits, streaming.dequantize_bfloat16, uniform.dequantize_bfloat16)

    return (
        {"float16": encode_float16, "bfloat16": encode_bfloat16},
        {"float16": decode_float16, "bfloat16": decode_bfloat16},
    )


def _files() -> int:
    """A number that changes with the text of the files that the loops take functions from."""
    text = "".join(inspect.getsource(module) for module in (uniform, packing, streaming))
    return 1 + zlib.crc32(text.encode())


_ENCODE, _DECODE = _loops(_files())


def encode(dtype: str, table: Table) -> npt.NDArray[np.float32]:
    """Values -> symbols and side information. dtype: "float16" or "bfloat16". Returns each part's largest step (`uniform`)."""
    worst = np.empty(len(table), dtype=np.float32)
    _ENCODE[dtype](table, worst)
    return worst


def decode(dtype: str, table: Table) -> npt.NDArray[np.bool_]:
    """Symbols and side information -> values. Returns whether each part could be decoded; what could not is left to torch."""
    fits = np.empty(len(table), dtype=np.float32)
    _DECODE[dtype](table, fits)
    return fits != 0
