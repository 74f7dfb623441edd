"""Zstandard over packed symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.steps import Coder, Piece
from testbed.errors import PayloadError


@dataclass(frozen=True)
class Zstd(Coder):
    """Zstandard (LZ77 and finite-state entropy), each layer's keys and values by themselves, over packed symbols.

    A part that does not shrink is sent packed. level: zstd's own, from -7 (fastest) to 19 (smallest).
    """

    name: ClassVar[str] = "zstd"
    source: ClassVar[str] = "Zstandard (RFC 8878)"

    level: int = 1

    def __post_init__(self) -> None:
        self.require("level", "from -7 to 19", -7 <= self.level <= 19)

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=self.level, write_content_size=False).compress(data)

    def expand(self, piece: Piece, data: memoryview) -> bytes:
        import zstandard

        size = self.input_bytes(piece)
        try:
            # A frame that names its size would be believed before max_output_size is; ours name none.
            if zstandard.frame_content_size(data) != -1:
                raise PayloadError("zstd: a frame that no encoder of ours writes")
            decompressor = zstandard.ZstdDecompressor()
            plain = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except (zstandard.ZstdError, MemoryError) as error:
            raise PayloadError(f"zstd: {str(error)[:80]}") from None
        if len(plain) != size:
            raise PayloadError(f"zstd: a part of {size} bytes gave {len(plain)}")
        return plain
