"""Eight-bit floating point, as accelerators hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.quantize import divided, over, rounded_up
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0  #: of E4M3


@dataclass(frozen=True)
class FP8(Quantizer):
    """Eight-bit floats (E4M3), scaled so that the largest element of each token and KV head is 448.

        q = e4m3(x / s),  s = max|x| / 448 in 16 bits, rounded up;  x̂ = q · s

    Three bits of mantissa: |x̂ - x| ≤ 2^-4 |x|, and ≤ 2^-10 s for elements below 2^-6 s.
    scale: what shares one, a token's elements in a KV head or the whole KV head.
    """

    name: ClassVar[str] = "fp8"
    source: ClassVar[str] = "FP8 Formats for Deep Learning (arXiv:2209.05433)"

    scale: Literal["token", "head"] = "token"

    def symbol_bits(self, part: Part) -> int:
        return 8

    def _scales(self, part: Part) -> tuple[int, int, int]:
        return part.kv_heads, part.tokens if self.scale == "token" else min(1, part.tokens), 1

    def side_bytes(self, part: Part) -> int:
        heads, each, _ = self._scales(part)
        return 2 * heads * each

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if not part.elements:
            return values.new_empty(0, dtype=torch.uint8), None
        self.require_finite(part, values)
        axes = (-1,) if self.scale == "token" else (-2, -1)
        largest = values.float().abs().amax(axes, keepdim=True)
        scale = rounded_up(divided(largest, LARGEST), getattr(torch, part.dtype))
        scaled = over(values, scale).clamp_(-LARGEST, LARGEST)
        return scaled.to(torch.float8_e4m3fn).contiguous().view(torch.uint8), scale

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        scale = side.view(dtype).view(self._scales(part)).float()
        limit = torch.finfo(dtype).max  # a scale that was rounded up may lead past it
        x = symbols.view(torch.float8_e4m3fn).view(part.shape).float()
        return x.mul_(scale).clamp_(-limit, limit)
