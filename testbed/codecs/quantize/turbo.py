"""TurboQuant: a random rotation makes every coordinate Gaussian, for which the best scalar quantizer is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.entropy import pack, unpack
from testbed.codecs.layout import packed_bytes
from testbed.codecs.quantize import cut_side, over, rounded_up, side_of
from testbed.codecs.quantize.rotation import blocks, rotation
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Turbo(Quantizer):
    """A random rotation, then the Lloyd-Max quantizer of the Gaussian that each coordinate becomes (TurboQuant, for MSE).

        r = ‖x‖ / √d in 16 bits;   y = R x / r;   q = nearest of the 2^bits levels;   x̂ = r · Rᵀ level(q)

    Outlier channels and the others are two vectors, each with its own r and R. outliers: the share of each KV head's channels
    that are taken as such, those of the largest mean magnitude over the tokens; the payload has a bit for each channel to say
    which (the paper: 32 of 128). extra: bits that they get more (8 at most in all). With outliers=0 all channels are one vector.

    R: random signs and a Hadamard transform, rebuilt from `seed`. No scales but r, no calibration: a vector's large elements are
    spread over all coordinates. ‖x̂ - x‖ = r · ‖level(q) - y‖; for Gaussian y the mean square error is Lloyd and Max's: 0.1175 r²
    at 2 bits, 0.0345 at 3, 0.0095 at 4, 0.0025 at 5. Vectors of more than 256 elements are rotated in blocks of 256, each with
    its own r.
    """

    name: ClassVar[str] = "turbo"
    source: ClassVar[str] = "TurboQuant (arXiv:2504.19874)"

    bits: int = 4
    outliers: float = 0.25
    extra: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.require("bits", "from 1 to 8", 1 <= self.bits <= 8)
        self.require("outliers", "from 0 to 0.5", 0 <= self.outliers <= 0.5)
        self.require("extra", "from 0 to 7", 0 <= self.extra <= 7)
        self.require("seed", "from 0 to 2147483647", 0 <= self.seed < 2**31)

    @property
    def _finer(self) -> int:
        """The bits that an outlier's symbol has more."""
        return min(self.extra, 8 - self.bits)

    def _apart(self, part: Part) -> int:
        """Outlier channels of a head."""
        return round(self.outliers * part.head_dim)

    def _vectors(self, part: Part) -> list[tuple[slice, int]]:
        """What is rotated together, of channels ordered with the outliers first, and its bits."""
        apart = self._apart(part)
        others = [slice(apart + block.start, apart + block.stop) for block in blocks(part.head_dim - apart)]
        return [(block, self.bits + self._finer) for block in blocks(apart)] + [
            (block, self.bits) for block in others
        ]

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def _side_sizes(self, part: Part) -> tuple[int, int, int]:
        """How many norms; bytes that say which channels are outliers; bytes of the outliers' lowest bits."""
        tokens, apart = part.kv_heads * part.tokens, self._apart(part)
        return (
            tokens * len(self._vectors(part)),
            packed_bytes(part.kv_heads * part.head_dim, 1) if apart else 0,
            packed_bytes(tokens * apart, self._finer),
        )

    def side_bytes(self, part: Part) -> int:
        norms, marks, lowest = self._side_sizes(part)
        return 2 * norms + marks + lowest

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        self.require_finite(part, values)
        apart, finer = self._apart(part), self._finer
        marks = _largest_channels(values, apart)
        ordered = values.gather(-1, _marked_first(marks)[:, None].expand(part.shape))
        symbols = torch.empty(part.shape, dtype=torch.uint8, device=values.device)
        sizes = []
        for block, bits in self._vectors(part):
            x = ordered[..., block].float()
            largest = x.abs().amax(-1, keepdim=True) if x.numel() else x.sum(-1, keepdim=True)
            x = over(x, largest)  # squares of large bf16 numbers are beyond float32
            size = rounded_up(
                x.square().mean(-1, keepdim=True).sqrt_().mul_(largest), getattr(torch, part.dtype)
            )
            turned = x @ rotation(x.shape[-1], self.seed).to(x.device).T
            borders = gaussian_levels(bits).to(values.device).unfold(0, 2, 1).mean(-1)
            symbols[..., block] = torch.bucketize(turned.mul_(over(largest, size)), borders).to(torch.uint8)
            sizes.append(size)
        side = [torch.cat(sizes, -1)]
        if apart:
            side.append(pack(marks, 1))
        if apart and finer:  # a part's symbols have one width: what an outlier's has more goes with the norms
            side.append(pack(symbols[..., :apart] & ((1 << finer) - 1), finer))
            symbols[..., :apart] >>= finer
        return symbols, side_of(*side)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        dtype = getattr(torch, part.dtype)
        apart, finer, vectors = self._apart(part), self._finer, self._vectors(part)
        _, mark_bytes, lowest_bytes = self._side_sizes(part)
        sizes, marks, lowest = cut_side(
            side,
            ((part.kv_heads, part.tokens, len(vectors)), dtype),
            ((mark_bytes,), torch.uint8),
            ((lowest_bytes,), torch.uint8),
        )
        q = symbols.int().view(part.shape)
        if apart and finer:
            outer = q[..., :apart]
            q[..., :apart] = (outer << finer) + unpack(lowest, outer.numel(), finer).view(outer.shape)
        y = torch.empty(part.shape, device=symbols.device)
        for i, (block, bits) in enumerate(vectors):
            levels = gaussian_levels(bits).to(y.device)[q[..., block]]
            turned = levels @ rotation(levels.shape[-1], self.seed).to(y.device)
            y[..., block] = turned * sizes[..., i : i + 1].float()
        if apart:
            order = _marked_first(unpack(marks, part.kv_heads * part.head_dim, 1).view(part.kv_heads, -1))
            y = torch.empty_like(y).scatter_(-1, order[:, None].expand(part.shape), y)
        limit = torch.finfo(dtype).max
        return y.clamp_(-limit, limit)


def _largest_channels(values: Tensor, count: int) -> Tensor:
    """[kv_heads, tokens, head_dim] -> uint8 [kv_heads, head_dim]: 1 for the `count` channels of each head whose mean magnitude
    over the tokens is largest, of equals the first.
    """
    import torch

    size = values.abs().sum(1, dtype=torch.float64)
    where = size.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros(size.shape, dtype=torch.uint8, device=values.device).scatter_(1, where, 1)


def _marked_first(marks: Tensor) -> Tensor:
    """[kv_heads, head_dim] of 0 and 1 -> the channels in the order in which they are coded: those marked, then the others."""
    return marks.argsort(dim=-1, descending=True, stable=True)


@lru_cache(8)
def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels, ascending, that quantize a standard Gaussian with the least mean square error; float32.

    Lloyd's iteration (S. P. Lloyd 1982, J. Max 1960) from the point density that is best for many levels, ∝ density^(1/3).
    """
    import numpy as np
    import torch
    from scipy import special

    count = 1 << bits
    levels = 3**0.5 * special.ndtri((np.arange(count) + 0.5) / count)
    for _ in range(500):
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(borders) / 2) / np.sqrt(2 * np.pi)
        levels = (density[:-1] - density[1:]) / np.diff(special.ndtr(borders))
    return torch.from_numpy((levels - levels[::-1]) / 2).float()
