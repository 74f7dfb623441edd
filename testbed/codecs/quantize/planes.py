"""Bit planes: an embedded code, whose every beginning is a coarser cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.quantize.integer import INTEGERS, Integer
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Planes(Quantizer):
    """Integers sent bit by bit: the most significant bit of everything first, then refinements.

    With the first k of B planes an element is known to lie in one of 2^k stretches of its group's range, and is taken for its
    middle: |x̂ - x| ≤ s · 2^(B-k-1) + s / 2, s = (max - min) / (2^B - 1); with all planes it is `Integer`'s, asymmetric.
    A `Decoder` has of a payload cut off anywhere the best cache `ready` that its bytes allow.
    """

    name: ClassVar[str] = "planes"
    source: ClassVar[str] = (
        "embedded coding, as of Shapiro's zerotrees (IEEE Trans. Signal Processing 41(12), 1993)"
    )

    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        self.require("bits", "2, 3, 4 or 8", self.bits in INTEGERS)
        self.require(
            "group", "0 (the whole head) or from 2 to 4096", self.group == 0 or 2 <= self.group <= 4096
        )

    @property
    def _integer(self) -> Integer:
        return INTEGERS[self.bits](group=self.group, symmetric=False, axis="token")

    @property
    def _flip(self) -> int:
        """Eight-bit integers are stored with a sign; here 0 is the least."""
        return 0x80 if self.bits == 8 else 0

    @property
    def planes(self) -> int:
        """Each bit is one."""
        return self.bits

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def side_bytes(self, part: Part) -> int:
        return self._integer.side_bytes(part)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        symbols, side = self._integer.encode(part, values)
        return symbols.bitwise_xor(self._flip), side

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        return self._integer.decode(part, symbols.bitwise_xor(self._flip), side)
