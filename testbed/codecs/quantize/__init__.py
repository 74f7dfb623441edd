"""Quantizers: from keys and values to whole numbers of a few bits, and the scales that lead back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.layout import Part
from testbed.codecs.method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantizer(Method):
    """Codes one part (keys or values of one layer) at a time. Sizes follow from the part's shape alone."""

    stage: ClassVar[Literal["quantizer"]] = "quantizer"

    def bits(self, part: Part) -> int:
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
