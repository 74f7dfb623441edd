"""Uniform quantization on the processor, compiled: parts of a cache, a row of a table each, many in one call.

A small model's cache is dozens of small parts; what Python does for each of them (views, allocations, calls) takes longer than
the arithmetic, so the loops are given a table of addresses. A part's elements are read once for their extremes and once to be
quantized, in registers; torch would write and read float32 between any two operations. The arithmetic is that of `Integer`,
operation by operation, so the symbols and values are its, bit for bit but for the sign of a zero. numba compiles it once a
machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from testbed.codecs.steps import Grid, Part

Table = npt.NDArray[np.int64]
#: Columns. Addresses: of 16-bit values, of scales and zero points, of symbols. PACKED: bits of a symbol there; 8: not packed.
VALUES, SIDE, SYMBOLS, _ROWS, _GROUPS, _SIZE, PACKED, _SYMMETRIC, _LEVELS, _OFFSET = range(10)
COLUMNS = 10


def settings(grid: Grid, part: Part) -> tuple[int, ...]:
    """The columns behind the addresses, of a part that has this grid."""
    shape = (part.kv_heads * part.tokens, part.head_dim // grid.size, grid.size)
    return (*shape, grid.bits, grid.symmetric, grid.levels, grid.offset)


def encode(dtype: str, table: Table) -> npt.NDArray[np.float32]:
    """Values ("float16" or "bfloat16") -> symbols and side information.

    Returns each part's largest step: NaN where it holds one; infinity where a value is, or values are too far apart.
    """
    worst = np.empty(len(table), dtype=np.float32)
    _encode(table, dtype == "float16", worst)
    return worst


def decode(dtype: str, table: Table) -> npt.NDArray[np.bool_]:
    """Symbols and side information -> values.

    Returns which parts: not those with numbers on the way that are infinite in 16 bits, or with groups that are no multiple of
    sixteen elements, which are left to torch.
    """
    fits = np.empty(len(table), dtype=np.bool_)
    _decode(table, dtype == "float16", fits)
    return fits


def _converted(source: Any, target: Any, instructions: Any) -> Any:
    """An intrinsic from one numba type to another. instructions: LLVM's, (builder, value) -> value."""

    @intrinsic
    def convert(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return instructions(builder, arguments[0])

        return target(source), generate

    return convert


_pointer = _converted(
    types.int64,
    types.CPointer(types.uint8),
    lambda build, address: build.inttoptr(address, ir.IntType(8).as_pointer()),
)
_float_of_bits = _converted(
    types.int32, types.float32, lambda build, bits: build.bitcast(bits, ir.FloatType())
)
_bits_of_float = _converted(
    types.float32, types.int32, lambda build, value: build.bitcast(value, ir.IntType(32))
)
_float_of_half = _converted(
    types.int16,
    types.float32,
    lambda build, bits: build.fpext(build.bitcast(bits, ir.HalfType()), ir.FloatType()),
)
_half_of_float = _converted(
    types.float32,
    types.int16,
    lambda build, value: build.bitcast(build.fptrunc(value, ir.HalfType()), ir.IntType(16)),
)


@numba.njit(inline="always")
def _widen(bits: Any, half: Any) -> Any:
    """A 16-bit float, fp16 (`half`) or bf16, as float32."""
    if half:
        return _float_of_half(bits)
    return _float_of_bits(np.int32(bits) << np.int32(16))


@numba.njit(inline="always")
def _narrow(value: Any, half: Any) -> Any:
    """The nearest 16-bit float, ties to even."""
    if half:
        return _half_of_float(value)
    bits = _bits_of_float(value)
    return np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@numba.njit(inline="always")
def _bytes_at(address: Any, size: Any) -> Any:
    return numba.carray(_pointer(address), (size,))


@numba.njit(inline="always")
def _halves_at(address: Any, shape: Any) -> Any:
    return _bytes_at(address, 2 * shape[0] * shape[1] * shape[2]).view(np.int16).reshape(shape)


_LANES = 16  #: values that are written at a time past the caches
#: Adding and subtracting it rounds half to even, as the unit in its last place is 1.
_ROUND = np.float32(1.5 * 2**23)


@numba.njit(inline="always")
def _quantize(x: Any, half: Any, how: Any, side: Any, out: Any) -> Any:
    """x [rows, groups, size] -> q in `out`, scales and zero points in `side` [rows, kinds, groups]; returns the largest step."""
    (_, groups, size), (symmetric, levels, offset) = x.shape, how
    worst, tiny, zero = np.float32(0), np.float32(2.0**-126), np.float32(0)
    reach, plus = np.float32(1) + np.float32(0.49) / levels, np.int32(offset)
    for row in range(x.shape[0]):
        for group in range(groups):
            low = zero
            if symmetric:
                # The sign apart, 16-bit floats are in the order of their bits.
                most = np.int16(0)
                for i in range(size):
                    most = max(most, np.int16(x[row, group, i] & np.int16(0x7FFF)))
                step = _widen(most, half) / levels
            else:
                least, most = np.int16(32767), np.int16(-32768)
                for i in range(size):
                    bits = x[row, group, i]
                    key = np.int16(bits ^ np.int16((bits >> np.int16(15)) & np.int16(0x7FFF)))
                    least, most = min(least, key), max(most, key)
                low = _widen(np.int16(least ^ ((least >> np.int16(15)) & np.int16(0x7FFF))), half) + zero
                high = _widen(np.int16(most ^ ((most >> np.int16(15)) & np.int16(0x7FFF))), half)
                step = high / levels - low / levels
                side[row, 1, group] = _narrow(low, half)
            if not step <= worst:
                worst = step  # NaN stays: nothing is greater than it, and it is compared for not being less
                if step != step:
                    return worst
            step = max(step, zero)
            scale = _narrow(max(step, tiny), half)
            if _widen(scale, half) * reach < step:
                scale += np.int16(1)  # the next positive number
            side[row, 0, group] = scale
            wide = _widen(scale, half)
            by = np.float32(1) / wide if wide > zero else zero
            less = low * by
            for i in range(size):
                scaled = _widen(x[row, group, i], half) * by - less
                # The whole number is in the low bits of the sum, too, which saves converting it.
                out[row, group, i] = np.uint8(_bits_of_float(np.float32(scaled + _ROUND)) + plus)
    return worst


def _dequantized(half: bool) -> Any:
    """An intrinsic for _LANES symbols, in fp16 (`half`) or bf16."""

    @intrinsic
    def lanes(
        context: Any, source: Any, target: Any, shift: Any, mask: Any, offset: Any, by: Any, plus: Any
    ) -> Any:
        """target[:_LANES] = (((source[:_LANES] >> shift) & mask) - offset) · by + plus, stored past the caches."""
        signature = types.void(
            types.int64, types.int64, types.uint8, types.uint8, types.int32, types.float32, types.float32
        )
        return signature, lambda context, builder, _, arguments: _generate(builder, half, *arguments)

    return lanes


def _generate(builder: Any, half: bool, source: Any, target: Any, *numbers: Any) -> None:
    int8, int16, int32, float32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()

    def lanes_of(kind: Any) -> Any:
        return ir.VectorType(kind, _LANES)

    def in_each(value: Any) -> Any:
        first = builder.insert_element(ir.Constant(lanes_of(value.type), ir.Undefined), value, int32(0))
        return builder.shuffle_vector(first, first, ir.Constant(lanes_of(int32), [0] * _LANES))

    shift, mask, offset, by, plus = map(in_each, numbers)
    packed = builder.load(builder.inttoptr(source, lanes_of(int8).as_pointer()), align=1)
    # Eight bits hold signed numbers; fewer leave the sign's bit at zero.
    q = builder.sext(builder.and_(builder.lshr(packed, shift), mask), lanes_of(int32))
    x = builder.sitofp(builder.sub(q, offset), lanes_of(float32))
    x = builder.fadd(builder.fmul(x, by), plus)
    if half:
        narrow = builder.bitcast(builder.fptrunc(x, lanes_of(ir.HalfType())), lanes_of(int16))
    else:  # as `_narrow`
        bits = builder.bitcast(x, lanes_of(int32))
        odd = builder.and_(builder.lshr(bits, in_each(int32(16))), in_each(int32(1)))
        bits = builder.add(builder.add(bits, in_each(int32(0x7FFF))), odd)
        narrow = builder.trunc(builder.lshr(bits, in_each(int32(16))), lanes_of(int16))
    store = builder.store(narrow, builder.inttoptr(target, narrow.type.as_pointer()), align=2 * _LANES)
    store.set_metadata("nontemporal", builder.module.add_metadata([int32(1)]))


_dequantized_half, _dequantized_bfloat = _dequantized(half=True), _dequantized(half=False)


@intrinsic
def _fence(context: Any) -> Any:
    """Makes what was stored past the caches visible to other cores before whatever this one does next."""
    return types.void(), lambda context, builder, signature, arguments: builder.fence("seq_cst")


@numba.njit(inline="always")
def _dequantize(source: Any, bits: Any, shape: Any, half: Any, how: Any, side: Any, target: Any) -> Any:
    """(q - offset) · s + z, [rows, groups, size], at `target`; returns whether every number on the way is finite in 16 bits.

    bits: of a symbol in a byte at `source`, 8, 4 or 2; a byte's are of rows that lie apart (`_combine`). Symbols become values in
    registers, which are written past the caches: what is decoded is larger than those, and an ordinary store first fetches what
    it writes over. It must be asked for at the store itself, which a loop in Python has no words for: hence LLVM's instructions.
    """
    (rows, groups, size), (symmetric, levels, offset) = shape, how
    fits, zero = True, np.float32(0)
    largest = np.float32(65504.0) if half else np.float32(3.3895313892515355e38)
    mask, share, less = np.uint8((1 << bits) - 1), 8 // bits, np.int32(offset)
    for i in range(share):
        at, shift = source, np.uint8(i * bits)
        for row in range(i * rows // share, (i + 1) * rows // share):
            for group in range(groups):
                by = _widen(side[row, 0, group], half)
                plus = zero if symmetric else _widen(side[row, 1, group], half)
                fits &= by * levels <= largest and plus + by * levels <= largest
                for _ in range(size // _LANES):
                    if half:
                        _dequantized_half(at, target, shift, mask, less, by, plus)
                    else:
                        _dequantized_bfloat(at, target, shift, mask, less, by, plus)
                    at += _LANES
                    target += 2 * _LANES
    _fence()
    return fits


@numba.njit(nogil=True)
def _dequantize_half(source: Any, bits: Any, shape: Any, how: Any, side: Any, target: Any) -> Any:
    """Once for each format and number of bits: what is known beforehand costs little, or nothing."""
    if bits == 8:
        return _dequantize(source, 8, shape, True, how, side, target)
    if bits == 4:
        return _dequantize(source, 4, shape, True, how, side, target)
    return _dequantize(source, 2, shape, True, how, side, target)


@numba.njit(nogil=True)
def _dequantize_bfloat(source: Any, bits: Any, shape: Any, how: Any, side: Any, target: Any) -> Any:
    if bits == 8:
        return _dequantize(source, 8, shape, False, how, side, target)
    if bits == 4:
        return _dequantize(source, 4, shape, False, how, side, target)
    return _dequantize(source, 2, shape, False, how, side, target)


@numba.njit(inline="always")
def _combine(symbols: Any, low: Any, width: Any, packed: Any) -> Any:
    """`width` bits of each symbol, from bit `low` on, 8 / width to a byte: the symbols of a byte lie packed.size apart."""
    n, share, mask = packed.size, 8 // width, np.uint8((1 << width) - 1)
    full = max(symbols.size - (share - 1) * n, 0)
    for i in range(share):
        own = symbols[i * n : i * n + full]
        for j in range(full):
            bits = np.uint8(np.uint8(np.uint8(own[j] >> low) & mask) << (width * i))
            packed[j] = bits if i == 0 else np.uint8(packed[j] | bits)
    for j in range(full, n):  # bytes whose last symbols are missing
        byte = np.uint8(0)
        for i in range(share):
            if i * n + j < symbols.size:
                bits = np.uint8(np.uint8(symbols[i * n + j] >> low) & mask)
                byte = np.uint8(byte | np.uint8(bits << (width * i)))
        packed[j] = byte


@numba.njit(inline="always")
def _spread(packed: Any, low: Any, width: Any, symbols: Any) -> Any:
    """The inverse: bits from `low` on, of symbols whose lower bits are set."""
    n, share, mask = packed.size, 8 // width, np.uint8((1 << width) - 1)
    full, below = max(symbols.size - (share - 1) * n, 0), np.uint8((1 << low) - 1)
    for i in range(share):
        own = symbols[i * n : i * n + full]
        for j in range(full):
            bits = np.uint8(np.uint8(np.uint8(packed[j] >> (width * i)) & mask) << low)
            own[j] = np.uint8(np.uint8(own[j] & below) | bits)
    for j in range(full, n):
        for i in range(share):
            if i * n + j < symbols.size:
                bits = np.uint8(np.uint8(np.uint8(packed[j] >> (width * i)) & mask) << low)
                symbols[i * n + j] = np.uint8(np.uint8(symbols[i * n + j] & below) | bits)


_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False}
_symbols, _table = types.uint8[::1], types.int64[:, ::1]


@numba.njit(types.void(_symbols, types.int64, _symbols), **_OPTIONS)
def pack(symbols: Any, bits: Any, packed: Any) -> None:
    """Symbols of 4, 3 or 2 bits -> bytes, as `entropy.pack` does."""
    quarter = (symbols.size + 3) // 4
    if bits == 4:
        _combine(symbols, 0, 4, packed)
    else:
        _combine(symbols, 0, 2, packed[:quarter])
    if bits == 3:
        _combine(symbols, 2, 1, packed[quarter:])


@numba.njit(types.void(_symbols, types.int64, _symbols), **_OPTIONS)
def unpack(packed: Any, bits: Any, symbols: Any) -> None:
    """The inverse of `pack`."""
    quarter = (symbols.size + 3) // 4
    if bits == 4:
        _spread(packed, 0, 4, symbols)
    else:
        _spread(packed[:quarter], 0, 2, symbols)
    if bits == 3:
        _spread(packed[quarter:], 2, 1, symbols)


@numba.njit(inline="always")
def _packed_bytes(count: Any, bits: Any) -> Any:
    """As `layout.packed_bytes`, of 8, 4, 3 or 2 bits."""
    return (count * 2 + 7) // 8 + (count + 7) // 8 if bits == 3 else (count * bits + 7) // 8


@numba.njit(inline="always")
def _room(table: Any) -> Any:
    """Memory for the symbols of the largest part whose symbols are packed."""
    most = 0
    for row in table:
        if row[PACKED] != 8:
            most = max(most, row[_ROWS] * row[_GROUPS] * row[_SIZE])
    return np.empty(most, dtype=np.uint8)


@numba.njit(inline="always")
def _of(row: Any) -> Any:
    """What a row says of a part: shape, symbols, how they are quantized, bits of one where it lies, side information."""
    shape, symmetric = (row[_ROWS], row[_GROUPS], row[_SIZE]), row[_SYMMETRIC] != 0
    how = symmetric, np.float32(row[_LEVELS]), np.float32(row[_OFFSET])
    side = _halves_at(row[SIDE], (shape[0], 1 if symmetric else 2, shape[1]))
    return shape, shape[0] * shape[1] * shape[2], how, row[PACKED], side


@numba.njit(inline="always")
def _encode_parts(table: Any, half: Any, worst: Any) -> Any:
    room = _room(table)
    for i in range(len(table)):
        row = table[i]
        shape, count, how, bits, side = _of(row)
        packed = _bytes_at(row[SYMBOLS], _packed_bytes(count, bits))
        symbols = packed if bits == 8 else room[:count]
        worst[i] = _quantize(_halves_at(row[VALUES], shape), half, how, side, symbols.reshape(shape))
        if bits != 8:
            pack(symbols, bits, packed)


@numba.njit(types.void(_table, types.boolean, types.float32[::1]), **_OPTIONS)
def _encode(table: Any, half: Any, worst: Any) -> None:
    if half:
        _encode_parts(table, True, worst)
    else:
        _encode_parts(table, False, worst)


@numba.njit(types.void(_table, types.boolean, types.boolean[::1]), **_OPTIONS)
def _decode(table: Any, half: Any, fits: Any) -> None:
    room = _room(table)
    for i in range(len(table)):
        row = table[i]
        shape, count, how, bits, side = _of(row)
        source, target = row[SYMBOLS], row[VALUES]
        if shape[2] % _LANES or target % (2 * _LANES):
            fits[i] = False
            continue
        if bits == 3 or shape[0] % (8 // bits):  # a byte's symbols are not of whole rows
            unpack(_bytes_at(source, _packed_bytes(count, bits)), bits, room[:count])
            source, bits = np.int64(room.ctypes.data), 8
        if half:
            fits[i] = _dequantize_half(source, bits, shape, how, side, target)
        else:
            fits[i] = _dequantize_bfloat(source, bits, shape, how, side, target)
