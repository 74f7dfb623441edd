"""How large each piece of a payload is: from shapes alone, so that a decoder can check before it allocates."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.codecs.steps import Part, Piece

if TYPE_CHECKING:
    from testbed.codecs.spec import CodecSpec
    from testbed.codecs.steps import Quantizer

ALIGNMENT = 4  # bytes: pieces start where float32 and int32 views may


@dataclass(frozen=True)
class Layout:
    """All parts of a cache, and the lengths of the two sections that hold them (symbols not entropy-coded)."""

    pieces: tuple[Piece, ...]
    side_bytes: int
    symbol_bytes: int


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@functools.lru_cache  # the parts of a cache are of a few sizes
def packed_bytes(symbols: int, bits: int) -> int:
    """Bytes of `symbols` symbols of `bits` bits each, packed: each stretch of `stretches` ends in a whole byte."""
    return sum(-(-symbols * width // 8) for width in stretches(bits))


def stretches(bits: int) -> tuple[int, ...]:
    """How a symbol is cut to be packed: widths that divide a byte, from the lowest bits up (3 is 2 and 1, 7 is 4, 2 and 1)."""
    return (bits,) if bits >= 8 else tuple(width for width in (4, 2, 1) if bits & width)


def lay_out(parts: Iterable[Part], quantizer: Quantizer) -> Layout:
    """The layout of these parts under a quantizer."""
    pieces, side_at, symbols_at = [], 0, 0
    for part in parts:
        bits, symbols, side = quantizer.symbol_bits(part), quantizer.symbols(part), quantizer.side_bytes(part)
        size = packed_bytes(symbols, bits)
        pieces.append(Piece(part, bits, symbols, side_at, side, symbols_at, size))
        side_at += aligned(side)
        symbols_at += aligned(size)
    return Layout(tuple(pieces), side_at, symbols_at)


def expected_bytes(spec: CodecSpec, layers: Iterable[tuple[int, int, int, int | None]], tokens: int) -> int:
    """About how many bytes the payload of a context of `tokens` tokens takes; needs no torch and no cache.

    layers: (kv_heads, head_dim, value_dim, window) of each. Without what an entropy coder saves; positions are
    counted as one bit for each context token, once.
    """
    ratio = getattr(spec.selector, "ratio", 1.0)
    kept = max(1, round(ratio * tokens)) if tokens else 0
    parts = []
    every = list(layers)
    for i, (heads, head_dim, value_dim, window) in enumerate(every):
        held = kept if window is None else tokens
        parts.append(Part(i, "keys", heads, held, head_dim, "float16", len(every)))
        parts.append(Part(i, "values", heads, held, value_dim, "float16", len(every)))
    layout = lay_out(parts, spec.quantizer)
    return 128 + (tokens // 8 if kept < tokens else 0) + layout.side_bytes + layout.symbol_bytes
