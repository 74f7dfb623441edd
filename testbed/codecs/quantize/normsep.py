"""Norm separation: each vector's length kept apart, its direction quantized by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.quantize import cut_side, over, side_of
from testbed.codecs.quantize.integer import INTEGERS, Integer
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormSep(Quantizer):
    """Each token's norm in 16 bits, its direction in few bits with a scale for each channel: a cure for outlier channels.

        r = ‖x‖ / √d,  u = x / r;   û = u quantized by channel (`Integer`, axis=channel);   x̂ = r · û / (‖û‖ / √d)

    The root mean square r stands for the norm, since it never exceeds the largest element. One channel far from the others
    widens no grid but its own, and tokens of unlike norms share one without harm. group: tokens that share a scale; 0: all.
    ‖x̂ - x‖ ≤ 2 · r · ‖û - u‖, as putting û back to its length at most doubles its error.
    """

    name: ClassVar[str] = "normsep"
    source: ClassVar[str] = (
        "norm-separated quantization (nsep+pchan), Zenodo 2026, metaSATOKEN/norm-separated-quantization"
    )

    bits: int = 4
    group: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        self.require("bits", "2, 3, 4 or 8", self.bits in INTEGERS)
        self.require("group", "0 (all tokens) or from 2 to 4096", self.group == 0 or 2 <= self.group <= 4096)

    @property
    def _integer(self) -> Integer:
        return INTEGERS[self.bits](group=self.group, symmetric=self.symmetric, axis="channel")

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def side_bytes(self, part: Part) -> int:
        return 2 * part.kv_heads * part.tokens + self._integer.side_bytes(part)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        self.require_finite(part, values)
        size = _root_mean_square(values).to(getattr(torch, part.dtype))
        symbols, side = self._integer.encode(part, over(values, size))
        return symbols, None if side is None else side_of(size, side)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        shape = (part.kv_heads, part.tokens, 1)
        (size,) = cut_side(side, (shape, dtype))
        direction = self._integer.decode(part, symbols, side[2 * part.kv_heads * part.tokens :])
        limit = torch.finfo(dtype).max
        return over(direction, _root_mean_square(direction)).mul_(size.float()).clamp_(-limit, limit)


def _root_mean_square(x: Tensor) -> Tensor:
    """[…, d] -> float32 […, 1]. Squares of large bf16 numbers are beyond float32, so the largest is taken out first."""
    if not x.numel():
        return x.float().sum(-1, keepdim=True)
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    return over(wide, largest).square_().mean(-1, keepdim=True).sqrt_().mul_(largest)
