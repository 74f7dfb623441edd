"""The loops of `fused` and `packing` for GPUs, in Triton: all parts of a cache in one launch, a table row a part.

A part's symbols are packed in stretches: an int4 byte holds a symbol of the part's first half and the one as far into its
second half. So a program takes a block of groups of each stretch, and a part whose groups do not fill its stretches evenly
is not for these kernels.

The arithmetic is that of `fused`, operation by operation: IEEE division (`div_rn`; a plain one is off by a unit in the
last place), products and sums that are not contracted (launch with ``enable_fp_fusion=False``), 16-bit formats in integers
where a conversion's rounding would be the compiler's to choose.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

#: What a row says: addresses of 16-bit values, of side information, of packed symbols; groups in each stretch; and what a
#: kernel found there (at first 0): the bits of the largest step, or 1 for a part that `fused` could not decode either.
VALUES, SIDE, PACKED, LENGTH, FOUND = (tl.constexpr(i) for i in range(5))
COLUMNS = tl.constexpr(5)
_ROUND = tl.constexpr(1.5 * 2**23)  # see `fused`
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _widen(bits, HALF: tl.constexpr):
    """16-bit floats, fp16 (HALF) or bf16, in int16 as float32."""
    value = (
        bits.to(tl.float16, bitcast=True) if HALF else (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    )
    return value.to(tl.float32)


@triton.jit
def _narrow(value, HALF: tl.constexpr):
    """The nearest 16-bit floats, ties to even, in int16."""
    if HALF:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        wide = value.to(tl.int32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int16)
    return bits


@triton.jit
def _ordered(bits):
    """int16 in the order of the 16-bit floats they are the bits of; its own inverse."""
    return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def _pointer(row, column: tl.constexpr, kind: tl.constexpr, align: tl.constexpr):
    """A row's address, which `align` divides. Told of the pointer, not of the number: the compiler forgets that."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(kind)), align)


@triton.jit
def _side_at(group, GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Where a group's scale is in side information [rows, kinds, GROUPS]; its zero point is GROUPS further."""
    return group if SYMMETRIC else group // GROUPS * (2 * GROUPS) + group % GROUPS


@triton.jit
def _quantized(
    x, used, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr, REACH: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """int16 [groups, size], and which columns are used -> symbols, scales, zero points, bits of the steps; all int32."""
    if SYMMETRIC:
        most = tl.max(x & 0x7FFF, 1).to(tl.int16)
        low = tl.zeros_like(most)
        base = low.to(tl.float32)
        step = tl.div_rn(_widen(most, HALF), LEVELS)
    else:
        keys = _ordered(x)
        least = tl.min(tl.where(used, keys, 32767), 1).to(tl.int16)
        most = tl.max(tl.where(used, keys, -32768), 1).to(tl.int16)
        base = _widen(_ordered(least), HALF) + 0.0
        low = _narrow(base, HALF)
        step = tl.div_rn(_widen(_ordered(most), HALF), LEVELS) - tl.div_rn(base, LEVELS)
    found = tl.where(step == step, tl.maximum(step, 0.0).to(tl.int32, bitcast=True), 0x7FFFFFFF)
    step = tl.maximum(step, 0.0)
    scale = _narrow(tl.maximum(step, _TINY), HALF).to(tl.int32)
    scale += (_widen(scale.to(tl.int16), HALF) * REACH < step).to(tl.int32)
    wide = _widen(scale.to(tl.int16), HALF)
    by = tl.where(wide > 0.0, tl.div_rn(1.0, tl.where(wide > 0.0, wide, 1.0)), 0.0)
    scaled = _widen(x, HALF) * by[:, None] - (base * by)[:, None]
    return (scaled + _ROUND).to(tl.int32, bitcast=True) + OFFSET, scale, low.to(tl.int32), found


@triton.jit
def encode(
    table, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    REACH: tl.constexpr, OFFSET: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, PACKED_ALIGN: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """Values -> side information, packed symbols, and the largest step.

    table: int64 [parts, COLUMNS]. Groups of SIZE elements, GROUPS of them a row; WIDTH: SIZE, or the next power of two.
    BLOCK groups of each of the STRETCHES a program. ALIGN, PACKED_ALIGN: what divides the addresses.
    """
    row = table + tl.program_id(1) * COLUMNS
    length = tl.load(row + LENGTH)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < length:
        values = _pointer(row, VALUES, tl.int16, ALIGN)
        side = _pointer(row, SIDE, tl.int16, 2)
        packed = _pointer(row, PACKED, tl.uint8, PACKED_ALIGN) + first * SIZE
        block, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
        own = first + block < length
        used = columns < SIZE
        mask = own[:, None] & used
        tile = block[:, None] * SIZE + columns
        bytes = tl.zeros((BLOCK, WIDTH), tl.int32)
        others, thirds = tl.zeros_like(bytes), tl.zeros_like(bytes)
        worst = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(STRETCHES):
            group = i * length + first
            x = tl.load(values + group * SIZE + tile, mask=mask, other=0)
            q, scale, low, found = _quantized(x, used, HALF, SYMMETRIC, LEVELS, REACH, OFFSET)
            worst = tl.maximum(worst, found)
            at = _side_at(group + block, GROUPS, SYMMETRIC)
            tl.store(side + at, scale.to(tl.int16), mask=own)
            if not SYMMETRIC:
                tl.store(side + at + GROUPS, low.to(tl.int16), mask=own)
            if BITS == 8:
                bytes = q
            elif BITS == 4:
                bytes |= (q & 15) << (4 * i)
            elif BITS == 2:
                bytes |= (q & 3) << (2 * i)
            else:
                thirds |= ((q >> 2) & 1) << i
                if i % 2 == 0:
                    bytes |= (q & 3) << i
                else:
                    others |= (q & 3) << (i - 1)
        tl.store(packed + tile, bytes.to(tl.uint8), mask=mask)
        if BITS == 3:
            tl.store(packed + length * SIZE + tile, others.to(tl.uint8), mask=mask)
            tl.store(packed + length * (2 * SIZE) + tile, thirds.to(tl.uint8), mask=mask)
        tl.atomic_max(row + FOUND, tl.max(worst, 0).to(tl.int64), sem="relaxed")


@triton.jit
def decode(
    table, HALF: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    LARGEST: tl.constexpr, OFFSET: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, PACKED_ALIGN: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """Side information and packed symbols -> values, and whether a number on the way is beyond LARGEST. As `encode`."""
    row = table + tl.program_id(1) * COLUMNS
    length = tl.load(row + LENGTH)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < length:
        values = _pointer(row, VALUES, tl.int16, ALIGN)
        side = _pointer(row, SIDE, tl.int16, 2)
        packed = _pointer(row, PACKED, tl.int8, PACKED_ALIGN) + first * SIZE
        block, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)[None, :]
        own = first + block < length
        mask = own[:, None] & (columns < SIZE)
        tile = block[:, None] * SIZE + columns
        bytes = tl.load(packed + tile, mask=mask, other=0).to(tl.int32)
        others, thirds = bytes, bytes
        if BITS == 3:
            others = tl.load(packed + length * SIZE + tile, mask=mask, other=0).to(tl.int32)
            thirds = tl.load(packed + length * (2 * SIZE) + tile, mask=mask, other=0).to(tl.int32)
        beyond = tl.zeros((BLOCK,), tl.int32)
        for i in tl.static_range(STRETCHES):
            group = i * length + first
            at = _side_at(group + block, GROUPS, SYMMETRIC)
            by = _widen(tl.load(side + at, mask=own, other=0), HALF)
            plus = tl.zeros((BLOCK,), tl.float32)
            if not SYMMETRIC:
                plus = _widen(tl.load(side + at + GROUPS, mask=own, other=0), HALF)
            span = by * LEVELS
            fits = (span <= LARGEST) & (plus + span <= LARGEST)
            beyond |= tl.where(fits, 0, 1)
            if BITS == 8:
                q = bytes
            elif BITS == 4:
                q = (bytes >> (4 * i)) & 15
            elif BITS == 2:
                q = (bytes >> (2 * i)) & 3
            else:
                q = ((thirds >> i) & 1) << 2
                if i % 2 == 0:
                    q |= (bytes >> i) & 3
                else:
                    q |= (others >> (i - 1)) & 3
            out = (q - OFFSET).to(tl.float32) * by[:, None] + plus[:, None]
            tl.store(values + group * SIZE + tile, _narrow(out, HALF), mask=mask)
        if tl.max(beyond, 0) > 0:
            tl.store(row + FOUND, tl.full((), 1, tl.int64))
