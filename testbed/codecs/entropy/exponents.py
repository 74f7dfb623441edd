"""16-bit numbers without loss: exponents repeat, signs and mantissas do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from testbed.codecs.entropy.ans import ANS
from testbed.codecs.entropy.zstd import Zstd
from testbed.codecs.steps import Coder, Piece
from testbed.errors import PayloadError

_CODERS: dict[str, Coder] = {"zstd": Zstd(), "ans": ANS(tables="part")}


@dataclass(frozen=True)
class Exponents(Coder):
    """Of each 16-bit number, the eight bits behind its sign entropy-coded, a part at a time, and the other eight as they are.

    Those are bfloat16's exponent, and float16's with the first three bits of its mantissa. A part is the other bytes
    (sign and last seven bits), one a number, and what the coder makes of the exponents: zstd, which is Huffman's code for
    what repeats no strings, or ans with one table, which takes many times as long.
    """

    name: ClassVar[str] = "exponents"
    source: ClassVar[str] = "DFloat11 (arXiv:2504.11651); ZipNN (arXiv:2411.05239)"

    coder: Literal["zstd", "ans"] = "zstd"

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        import numpy as np

        numbers = np.frombuffer(data, dtype="<u2")
        others = (numbers & 0x7F).astype(np.uint8)
        others |= (numbers >> 8).astype(np.uint8) & 0x80
        exponents = (numbers >> 7).astype(np.uint8)  # the sign is cut off
        return others.tobytes() + _CODERS[self.coder].compress(_bytes_of(piece), exponents.data)

    def expand(self, piece: Piece, data: memoryview) -> bytearray:
        import numpy as np

        if len(data) <= piece.symbols:
            raise PayloadError(f"exponents: {len(data)} bytes for {piece.symbols} numbers")
        others = np.frombuffer(data[: piece.symbols], dtype=np.uint8)
        coded = _CODERS[self.coder].expand(_bytes_of(piece), data[piece.symbols :])
        out = bytearray(self.input_bytes(piece))
        numbers = np.frombuffer(out, dtype="<u2")
        numbers[:] = np.frombuffer(coded, dtype=np.uint8)
        numbers <<= 7
        numbers |= others & 0x7F
        numbers |= (others & 0x80).astype(np.uint16) << 8
        return out


def _bytes_of(piece: Piece) -> Piece:
    """A part's exponents, a byte each."""
    return replace(piece, bits=8, symbol_bytes=piece.symbols)
