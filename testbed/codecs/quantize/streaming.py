"""Packed symbols to 16-bit values without a stop in memory: sixteen at a time, in registers, written past the caches.

What is decoded is written once, and is larger than the processor's caches. An ordinary store first fetches the line that it
writes to, so that much of what crosses the memory bus is what was there before; a non-temporal store fetches nothing. It must
be asked for at the store itself, which a loop in Python has no words for: hence instructions of LLVM, which it has for every
processor. The arithmetic is that of `uniform`, operation by operation, so the values are the same.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from testbed.codecs.fast import uniform

LANES = 16  #: symbols at a time; their values must lie at a multiple of 2 · LANES bytes


def _dequantize_lanes(half: bool) -> Any:
    @intrinsic
    def lanes(
        context: Any, source: Any, target: Any, shift: Any, mask: Any, offset: Any, by: Any, plus: Any
    ) -> Any:
        """target[:LANES] = (((source[:LANES] >> shift) & mask) - offset) · by + plus, in fp16 (`half`) or bf16."""
        floating, byte = types.float32, types.uint8
        signature = types.void(types.int64, types.int64, byte, byte, floating, floating, floating)
        return signature, lambda context, builder, _, arguments: _generate(builder, half, *arguments)

    return lanes


def _generate(
    builder: Any, half: bool, source: Any, target: Any, shift: Any, mask: Any, offset: Any, by: Any, plus: Any
) -> None:
    from llvmlite import ir

    int8, int16, int32, float32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()

    def lanes_of(kind: Any) -> Any:
        return ir.VectorType(kind, LANES)

    def same(value: Any) -> Any:
        """`value` in every lane."""
        one = builder.insert_element(ir.Constant(lanes_of(value.type), ir.Undefined), value, int32(0))
        return builder.shuffle_vector(one, one, ir.Constant(lanes_of(int32), [0] * LANES))

    packed = builder.load(builder.inttoptr(source, lanes_of(int8).as_pointer()), align=1)
    q = builder.and_(builder.lshr(packed, same(shift)), same(mask))
    # Eight bits hold signed numbers; fewer leave the sign's bit at zero.
    q = builder.sub(builder.sext(q, lanes_of(int32)), same(builder.fptosi(offset, int32)))
    x = builder.sitofp(q, lanes_of(float32))
    x = builder.fadd(builder.fmul(x, same(by)), same(plus))
    if half:
        narrow = builder.bitcast(builder.fptrunc(x, lanes_of(ir.HalfType())), lanes_of(int16))
    else:  # to the nearest, ties to even, as `uniform` does
        bits = builder.bitcast(x, lanes_of(int32))
        odd = builder.and_(builder.lshr(bits, same(int32(16))), same(int32(1)))
        bits = builder.add(builder.add(bits, same(int32(0x7FFF))), odd)
        narrow = builder.trunc(builder.lshr(bits, same(int32(16))), lanes_of(int16))
    store = builder.store(narrow, builder.inttoptr(target, narrow.type.as_pointer()), align=2 * LANES)
    store.set_metadata("nontemporal", builder.module.add_metadata([int32(1)]))


_lanes_float16, _lanes_bfloat16 = _dequantize_lanes(half=True), _dequantize_lanes(half=False)


@intrinsic
def _fence(context: Any) -> Any:
    """Makes non-temporal stores visible to other cores before whatever this one does next."""
    return types.void(), lambda context, builder, _, arguments: builder.fence("seq_cst")


@numba.njit(inline="always")
def takes(bits: Any, shape: Any, target: Any) -> Any:
    """Whether values [rows, groups, size] at this address can be written LANES at a time, from symbols of so many bits.

    Symbols of a byte are of rows that lie apart (`packing`): each of its 8 / bits symbols from a stretch of its own.
    """
    whole = bits == 8 or bits == 4 or bits == 2
    return whole and shape[0] % (8 // bits) == 0 and shape[2] % LANES == 0 and target % (2 * LANES) == 0


@numba.njit(inline="always")
def _dequantize(
    source: Any,
    bits: Any,
    shape: Any,
    half: Any,
    symmetric: Any,
    levels: Any,
    offset: Any,
    side: Any,
    target: Any,
) -> Any:
    rows, groups, size = shape
    fits, zero = True, np.float32(0)
    mask, of_a_byte = np.uint8((1 << bits) - 1), 8 // bits
    for i in range(of_a_byte):
        at, shift = source, np.uint8(i * bits)
        for row in range(i * rows // of_a_byte, (i + 1) * rows // of_a_byte):
            for group in range(groups):
                by = uniform.widen(side[row, 0, group], half)
                plus = zero if symmetric else uniform.widen(side[row, 1, group], half)
                fits &= uniform.is_finite(by, plus, levels, half)
                for _ in range(size // LANES):
                    if half:
                        _lanes_float16(at, target, shift, mask, offset, by, plus)
                    else:
                        _lanes_bfloat16(at, target, shift, mask, offset, by, plus)
                    at += LANES
                    target += 2 * LANES
    _fence()
    return fits


@numba.njit(inline="always")
def _of_known_width(
    source: Any,
    bits: Any,
    shape: Any,
    half: Any,
    symmetric: Any,
    levels: Any,
    offset: Any,
    side: Any,
    target: Any,
) -> Any:
    """Compiled once for each number of bits: shifts and masks that are constants cost little, or nothing."""
    if bits == 8:
        return _dequantize(source, 8, shape, half, symmetric, levels, offset, side, target)
    if bits == 4:
        return _dequantize(source, 4, shape, half, symmetric, levels, offset, side, target)
    return _dequantize(source, 2, shape, half, symmetric, levels, offset, side, target)


@numba.njit(nogil=True)
def dequantize_float16(
    source: Any, bits: Any, shape: Any, symmetric: Any, levels: Any, offset: Any, side: Any, target: Any
) -> Any:
    """As `uniform.dequantize_float16`, from symbols at the address `source` to values [rows, groups, size] at `target`.

    bits: 8, 4 or 2 of a symbol, packed as `packing` says. Only for what `takes` takes.
    """
    return _of_known_width(source, bits, shape, True, symmetric, levels, offset, side, target)


@numba.njit(nogil=True)
def dequantize_bfloat16(
    source: Any, bits: Any, shape: Any, symmetric: Any, levels: Any, offset: Any, side: Any, target: Any
) -> Any:
    """The same for bf16."""
    return _of_known_width(source, bits, shape, False, symmetric, levels, offset, side, target)
