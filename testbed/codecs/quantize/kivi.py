"""KIVI: keys by channel, values by token, and the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.quantize import cut_side, side_of
from testbed.codecs.quantize.integer import INTEGERS, Integer
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kivi(Quantizer):
    """Keys per channel in groups of tokens, values per token in groups of channels, the last tokens in 16 bits.

        K:  q = round((k - z) / s), one s and z for `group` tokens of a channel
        V:  the same for `group` channels of a token;  both with s = (max - min) / (2^bits - 1), z = min

    Keys have channels far from zero over all tokens, values do not. The last `residual` tokens of each head, which the
    question attends to most, are sent as they are. (The paper lets that number vary for keys, up to `residual`, so that
    groups are full; here it is exact, and the last group of keys may be short.) Bound: that of `Integer`.
    """

    name: ClassVar[str] = "kivi"
    source: ClassVar[str] = "KIVI (arXiv:2402.02750)"

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        self.require("bits", "2, 3, 4 or 8", self.bits in INTEGERS)
        self.require("group", "from 2 to 4096", 2 <= self.group <= 4096)
        self.require("residual", "from 0 to 65536", 0 <= self.residual <= 65536)

    def _inner(self, part: Part) -> tuple[Integer, Part]:
        """The quantizer of the older tokens, and their part."""
        older = max(0, part.tokens - self.residual)
        integer = INTEGERS[self.bits](
            group=self.group, symmetric=False, axis="channel" if part.kind == "keys" else "token"
        )
        return integer, replace(part, tokens=older)

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def symbols(self, part: Part) -> int:
        return self._inner(part)[1].elements

    def side_bytes(self, part: Part) -> int:
        integer, older = self._inner(part)
        return integer.side_bytes(older) + 2 * (part.elements - older.elements)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        self.require_finite(part, values)
        integer, older = self._inner(part)
        newest = values[:, older.tokens :].to(getattr(torch, part.dtype))
        symbols, side = integer.encode(older, values[:, : older.tokens])
        return symbols, newest.contiguous() if side is None else side_of(side, newest)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        integer, older = self._inner(part)
        split = integer.side_bytes(older)
        rest = (part.kv_heads, part.tokens - older.tokens, part.head_dim)
        (newest,) = cut_side(side[split:], (rest, getattr(torch, part.dtype)))
        return torch.cat([integer.decode(older, symbols, side[:split]), newest.float()], 1)
