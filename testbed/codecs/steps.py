"""What a codec is made of: transform, quantizer and coder, and the parts of a cache that they are given one at a time.

Each is a method with a file of its own in `transform/`, `quantize/` or `entropy/`; here is what they have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.evidence import Needs
from testbed.codecs.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence
    from testbed.models.kvcache import KVCache


@dataclass(frozen=True)
class Part:
    """Keys or values of one layer: what a quantizer takes at a time. Shape [kv_heads, tokens, head_dim]."""

    layer: int
    kind: Literal["keys", "values"]
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: str  #: "float16" or "bfloat16"
    layers: int | None = None  #: how many the cache has; None where that is not known

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.tokens, self.head_dim

    @property
    def elements(self) -> int:
        return self.kv_heads * self.tokens * self.head_dim


@dataclass(frozen=True)
class Piece:
    """Where a part's bytes lie: its side information in the side section, its packed symbols in the symbol section."""

    part: Part
    bits: int
    symbols: int
    side_at: int
    side_bytes: int
    symbols_at: int
    symbol_bytes: int


@dataclass(frozen=True)
class Grid:
    """Uniform quantization of groups of `size` elements: q = round((x - z) / s) + offset, in `bits` bits.

    symmetric: z = 0 and q - offset from -levels to levels; else from 0 to levels, with a zero point for each group.
    """

    bits: int
    symmetric: bool
    size: int

    @property
    def levels(self) -> int:
        """The largest multiple of the scale."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def offset(self) -> int:
        """What is added before q is stored: eight bits store int8, fewer store unsigned numbers."""
        if self.bits == 8:
            return 0 if self.symmetric else -128
        return 2 ** (self.bits - 1) if self.symmetric else 0


@dataclass(frozen=True)
class Transform(Method):
    """A reversible change of keys and values. Shapes and positions stay; values may be float32 in between."""

    stage: ClassVar[Literal["transform"]] = "transform"

    @property
    def undoes_rope(self) -> bool:
        """Whether it turns keys back from their positions, so that the cache should know how (`KVLayer.rope`)."""
        return False

    def unfit(self, quantizer: Quantizer) -> str:
        """Why it cannot stand before that quantizer; empty where it can."""
        return ""

    def encode(self, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
        """The cache to quantize, and bytes that `decode` needs beside it (counted in the payload).

        `quantizer` tells a transform that predicts from decoded values what the decoder will see.
        """
        raise NotImplementedError

    def decode(self, cache: KVCache, side: bytes) -> KVCache:
        """The inverse, on float32 values. Raises PayloadError where `side` is not what `encode` writes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantizer(Method):
    """Codes one part (keys or values of one layer) at a time. Sizes follow from the part's shape alone."""

    stage: ClassVar[Literal["quantizer"]] = "quantizer"

    @property
    def planes(self) -> int:
        """Bit planes in which its symbols are sent one by one (`progressive`), so that the beginning of a payload decodes too;
        0: they are not.
        """
        return 0

    @property
    def by_token(self) -> bool:
        """Whether a token's symbols and scales depend on that token alone, whichever others are coded with it."""
        return False

    @property
    def own_transform(self) -> Transform | None:
        """A transform that it brings with it where the codec names none."""
        return None

    @property
    def own_coder(self) -> Coder | None:
        """An entropy coder that it brings with it where the codec names none."""
        return None

    def needs(self) -> Needs:
        """What `channels` looks at."""
        return Needs()

    def channels(self, evidence: Evidence, layer: int, together: bool) -> Tensor | None:
        """Which channels of a layer's keys are worth sending, bool [kv_heads, head_dim]; None: it does not choose.

        together: heads share their choice. Those that are not chosen reach `encode` as zeros. Raises CodecError where the
        evidence lacks what that needs.
        """
        return None

    def uniform(self, part: Part) -> Grid | None:
        """The grid of a part that is coded token by token in groups of equal size, which `fast` does in its place."""
        return None

    def symbol_bits(self, part: Part) -> int:
        """Bits of a symbol: from 1 to 8, or 16."""
        raise NotImplementedError

    def symbols(self, part: Part) -> int:
        """How many symbols a part becomes."""
        return part.elements

    def side_bytes(self, part: Part) -> int:
        """Bytes of the side information (scales, zero points): true bytes, counted in the payload."""
        return 0

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """[kv_heads, tokens, head_dim] -> (symbols, side information of `side_bytes` bytes in any format).

        Symbols are uint8 (int16 for 16 bits), contiguous, below 2^bits. Raises CodecError for NaN and infinity.
        """
        raise NotImplementedError

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        """The inverse: flat symbols and uint8 [side_bytes] -> [kv_heads, tokens, head_dim], float32 or 16-bit.

        May write over `symbols` where that is not the payload itself; any bytes give a result, if not a good one.
        """
        raise NotImplementedError

    def require_finite(self, part: Part, values: Tensor) -> None:
        """Raises CodecError naming the place where values are NaN or infinite."""
        if not values.numel():
            return
        if not all(math.isfinite(float(extreme)) for extreme in values.aminmax()):
            raise CodecError(f"{self.name}: {part.kind} of layer {part.layer} hold NaN or infinity")


@dataclass(frozen=True)
class Coder(Method):
    """Codes one part at a time, bytes to bytes; several threads may call it at once.

    `packed`: it is given symbols packed to their width; otherwise a byte for each (two for 16 bits).
    """

    stage: ClassVar[Literal["coder"]] = "coder"
    packed: ClassVar[bool] = True

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        """A part's symbols, coded. A result that does not shrink what packing gives is not used."""
        raise NotImplementedError

    def expand(self, piece: Piece, data: memoryview) -> bytes | bytearray:
        """The inverse: exactly the bytes that `compress` was given, whose number `piece` says.

        Raises PayloadError for other bytes than `compress` returns; allocates what `piece` says and no more.
        """
        raise NotImplementedError

    def input_bytes(self, piece: Piece) -> int:
        """How many bytes `compress` is given for a part."""
        return piece.symbol_bytes if self.packed else piece.symbols * (2 if piece.bits == 16 else 1)
