"""LZ4 over packed symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.steps import Coder, Piece
from testbed.errors import PayloadError


@dataclass(frozen=True)
class LZ4(Coder):
    """LZ4 blocks (repeated bytes only, no entropy code), each layer's keys and values by themselves, over packed symbols.

    Quantized caches hardly repeat, so most parts are sent packed: the floor for coders. thorough: search longer.
    """

    name: ClassVar[str] = "lz4"
    source: ClassVar[str] = "LZ4 block format (lz4.org)"

    thorough: bool = False

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        import lz4.block

        mode = "high_compression" if self.thorough else "default"
        return lz4.block.compress(data, mode=mode, store_size=False)

    def expand(self, piece: Piece, data: memoryview) -> bytes:
        import lz4.block

        size = self.input_bytes(piece)
        try:
            plain = lz4.block.decompress(data, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, MemoryError, ValueError) as error:
            raise PayloadError(f"lz4: {str(error)[:80]}") from None
        if len(plain) != size:
            raise PayloadError(f"lz4: a part of {size} bytes gave {len(plain)}")
        return plain
