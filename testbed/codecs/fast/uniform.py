"""Uniform quantization on the processor, in one pass over a part instead of one for each operation.

A part's elements are read once for their extremes and once to be quantized, in registers; torch would write and read
float32 between any two operations, which takes the time. The arithmetic is the same, operation by operation, so that the
symbols and values are those of `integer`, bit for bit but for the sign of a zero. numba compiles it once a machine.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

_ROUND = np.float32(
    1.5 * 2**23
)  # adding and subtracting it rounds half to even, as the unit in its last place is 1
_FLOAT, _INT, _HALF = types.float32, types.int32, types.int16


@intrinsic
def _float_of_bits(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.bitcast(arguments[0], ir.FloatType())

    return _FLOAT(_INT), generate


@intrinsic
def _bits_of_float(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.bitcast(arguments[0], ir.IntType(32))

    return _INT(_FLOAT), generate


@intrinsic
def _float_of_half(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return _FLOAT(_HALF), generate


@intrinsic
def _half_of_float(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return _HALF(_FLOAT), generate


@numba.njit(inline="always")
def widen(bits: Any, half: Any) -> Any:
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


OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False}
_elements, _bytes = types.int16[:, :, ::1], types.int8[:, :, ::1]
_settings = (types.boolean, types.float32, types.float32)  # symmetric, levels, offset


@numba.njit(inline="always")
def _quantize(x: Any, half: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    groups, size = x.shape[1], x.shape[2]
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
                step = widen(most, half) / levels
            else:
                least, most = np.int16(32767), np.int16(-32768)
                for i in range(size):
                    bits = x[row, group, i]
                    key = np.int16(bits ^ np.int16((bits >> np.int16(15)) & np.int16(0x7FFF)))
                    least, most = min(least, key), max(most, key)
                low = widen(np.int16(least ^ ((least >> np.int16(15)) & np.int16(0x7FFF))), half) + zero
                high = widen(np.int16(most ^ ((most >> np.int16(15)) & np.int16(0x7FFF))), half)
                step = high / levels - low / levels
                side[row, 1, group] = _narrow(low, half)
            if not step <= worst:
                worst = step  # NaN stays: nothing is greater than it, and it is compared for not being less
                if step != step:
                    return worst
            step = max(step, zero)
            scale = _narrow(max(step, tiny), half)
            if widen(scale, half) * reach < step:
                scale += np.int16(1)  # the next positive number
            side[row, 0, group] = scale
            wide = widen(scale, half)
            by = np.float32(1) / wide if wide > zero else zero
            less = low * by
            for i in range(size):
                scaled = widen(x[row, group, i], half) * by - less
                # The whole number is in the low bits of the sum, too, which saves converting it.
                out[row, group, i] = np.int8(_bits_of_float(np.float32(scaled + _ROUND)) + plus)
    return worst


@numba.njit(types.float32(_elements, *_settings, _elements, _bytes), **OPTIONS)
def quantize_float16(x: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    """x [rows, groups, size] -> q in `out`, scales and zero points in `side` [rows, kinds, groups]; returns the largest step.

    q = round((x - z) / s) + offset, as `Integer` says. NaN where x holds one; infinity where x is, or is too far apart.
    """
    return _quantize(x, True, symmetric, levels, offset, side, out)


@numba.njit(types.float32(_elements, *_settings, _elements, _bytes), **OPTIONS)
def quantize_bfloat16(x: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    """The same for bf16."""
    return _quantize(x, False, symmetric, levels, offset, side, out)


@numba.njit(inline="always")
def is_finite(by: Any, plus: Any, levels: Any, half: Any) -> Any:
    """Whether every number from a group's symbols to its values is finite in 16 bits."""
    largest = np.float32(65504.0) if half else np.float32(3.3895313892515355e38)
    return by * levels <= largest and plus + by * levels <= largest


@numba.njit(inline="always")
def _dequantize(q: Any, half: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    fits, zero = True, np.float32(0)
    for row in range(q.shape[0]):
        for group in range(q.shape[1]):
            by = widen(side[row, 0, group], half)
            plus = zero if symmetric else widen(side[row, 1, group], half)
            fits &= is_finite(by, plus, levels, half)
            for i in range(q.shape[2]):
                out[row, group, i] = _narrow((np.float32(q[row, group, i]) - offset) * by + plus, half)
    return fits


@numba.njit(types.boolean(_bytes, *_settings, _elements, _elements), **OPTIONS)
def dequantize_float16(q: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    """out = (q - offset) · s + z, [rows, groups, size]; returns whether every number on the way is finite in 16 bits."""
    return _dequantize(q, True, symmetric, levels, offset, side, out)


@numba.njit(types.boolean(_bytes, *_settings, _elements, _elements), **OPTIONS)
def dequantize_bfloat16(q: Any, symmetric: Any, levels: Any, offset: Any, side: Any, out: Any) -> Any:
    """The same for bf16."""
    return _dequantize(q, False, symmetric, levels, offset, side, out)


QUANTIZE = {"float16": quantize_float16, "bfloat16": quantize_bfloat16}
DEQUANTIZE = {"float16": dequantize_float16, "bfloat16": dequantize_bfloat16}
