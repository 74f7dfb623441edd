"""CacheGen: few levels for each token's vector, fewer in later layers, and an entropy coder that knows the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.entropy.ans import ANS
from testbed.codecs.quantize import cut_side, divided, over, rounded_up, side_of
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.steps import Coder

#: level -> bins of keys in the first, second and third stretch of layers, and of values in the first and second. Levels
#: 1 to 3 are the released system's; 4 goes on where they end.
LEVELS = {
    1: ((16, 16, 12), (16, 12)),
    2: ((32, 16, 16), (32, 16)),
    3: ((32, 32, 32), (32, 32)),
    4: ((64, 64, 64), (64, 64)),
}
#: The layers at which the later stretches begin, as the released system has them for models of so many layers.
KEYS_FROM, VALUES_FROM, RELEASED_LAYERS = (10, 20), (2,), 32
ANCHOR_LEVELS = 127


@dataclass(frozen=True)
class CacheGen(Quantizer):
    """A token's keys (or values) of one layer share a scale and have few levels; then `ans`, with tables by channel.

        q = round(x / s),  s = max|x| / L over all KV heads and channels, rounded up in 16 bits,  L = bins/2 - 1;  x̂ = q · s

    So |x̂ - x| ≤ s / 2 and x̂'s own rounding. level: 1 (fewest bytes) to 4; keys have fewer bins from the second and third
    third of the layers on, values from the third layer of 32 on; models of other depth in proportion.
    anchor=n: the first token of each n is sent with 8 bits, and of the others the difference to it as it arrives, quantized
    as above (the paper's section 5.2; the released system has no differences). 0: none.
    """

    name: ClassVar[str] = "cachegen"
    source: ClassVar[str] = "CacheGen (arXiv:2310.07240) and its release in LMCache"

    level: int = 2
    anchor: int = 0

    def __post_init__(self) -> None:
        self.require("level", "from 1 to 4", self.level in LEVELS)
        self.require(
            "anchor", "0 (no differences) or from 2 to 4096", self.anchor == 0 or 2 <= self.anchor <= 4096
        )

    @property
    def by_token(self) -> bool:
        return self.anchor == 0

    @property
    def own_coder(self) -> Coder | None:
        return ANS()

    def bins(self, part: Part) -> int:
        """Of a layer's keys or values."""
        keys, values = LEVELS[self.level]
        bins, later = (keys, KEYS_FROM) if part.kind == "keys" else (values, VALUES_FROM)
        return bins[sum(part.layer >= _scaled(first, part.layers) for first in later)]

    def _most(self, part: Part) -> int:
        """The largest multiple of the scale."""
        return self.bins(part) // 2 - 1

    def _anchors(self, part: Part) -> int:
        return -(-part.tokens // self.anchor) if self.anchor else 0

    def _others(self, part: Part) -> tuple[int, int, int]:
        return part.kv_heads, part.tokens - self._anchors(part), part.head_dim

    def symbol_bits(self, part: Part) -> int:
        return (2 * self._most(part)).bit_length()

    def symbols(self, part: Part) -> int:
        heads, tokens, width = self._others(part)
        return heads * tokens * width

    def side_bytes(self, part: Part) -> int:
        return 2 * part.tokens + self._anchors(part) * part.kv_heads * part.head_dim

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if not part.elements:
            return values.new_empty(0, dtype=torch.uint8), values.new_zeros(self.side_bytes(part)).byte()
        self.require_finite(part, values)
        x = values.float()
        if not self.anchor:
            q, scale = _quantized(x, self._most(part), part.dtype)
            return q.to(torch.uint8), scale
        anchors, anchor_scale = _quantized(x[:, :: self.anchor], ANCHOR_LEVELS, part.dtype)
        known = _levels(anchors, ANCHOR_LEVELS, anchor_scale)
        where = self._where(part, x)
        limit = torch.finfo(torch.float32).max
        d = (x[:, where] - known[:, where // self.anchor]).clamp_(-limit, limit)
        q, scale = _quantized(d, self._most(part), part.dtype)
        return q.to(torch.uint8), side_of(scale, anchor_scale, anchors.to(torch.uint8))

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        heads, others, width = self._others(part)
        count = self._anchors(part)
        scale, anchor_scale, anchors = cut_side(
            side, ((others,), dtype), ((count,), dtype), ((heads, count, width), torch.uint8)
        )
        x = _levels(symbols.view(heads, others, width), self._most(part), scale)
        if self.anchor and part.elements:
            known = _levels(anchors, ANCHOR_LEVELS, anchor_scale)
            where = self._where(part, x)
            out = x.new_empty(part.shape)
            out[:, :: self.anchor] = known
            out[:, where] = x.add_(known[:, where // self.anchor])
            x = out
        limit = torch.finfo(dtype).max  # a scale that was rounded up may lead past it
        return x.clamp_(-limit, limit)

    def _where(self, part: Part, like: Tensor) -> Tensor:
        """Indices of the tokens that are no anchors."""
        import torch

        tokens = torch.arange(part.tokens, device=like.device)
        return tokens[tokens % self.anchor != 0]


def _scaled(first: int, layers: int | None) -> int:
    """The layer of a model of so many that is as deep as `first` is in the released system's; the nearest, not the first."""
    return max(1, (2 * first * (layers or RELEASED_LAYERS) + RELEASED_LAYERS) // (2 * RELEASED_LAYERS))


def _quantized(x: Tensor, most: int, dtype: str) -> tuple[Tensor, Tensor]:
    """[kv_heads, tokens, dim] -> levels from 0 to 2·most in float32, and a scale for each token in 16 bits."""
    import torch

    if not x.numel():
        return x, x.new_empty(x.shape[1], dtype=getattr(torch, dtype))
    scale = rounded_up(divided(x.abs().amax((0, 2)), most), getattr(torch, dtype))
    return over(x, scale[:, None]).round_().clamp_(-most, most).add_(most), scale


def _levels(q: Tensor, most: int, scale: Tensor) -> Tensor:
    """The inverse of `_quantized`, in float32."""
    return (q.float() - most).mul_(scale.float()[:, None])
