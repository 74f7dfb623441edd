"""KVQuant: keys by channel before their rotary embedding, levels that follow the data, and outliers kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.quantize import cut_side, over, rounded_up, side_of
from testbed.codecs.steps import Part, Quantizer, Transform
from testbed.codecs.transform.unrotated import Unrotated

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SAMPLE = 1 << 16  # elements of a part that its levels are fitted to
_ROUNDS = 25  # of Lloyd's iteration


@dataclass(frozen=True)
class KVQuant(Quantizer):
    """Pre-RoPE keys per channel, values per token, non-uniform levels, the largest outliers apart in 16 bits.

        u = (x - z) / s in [-1, 1], z and s the middle and half of the range of a key's channel, or of a token's values,
        without its `outliers` (a fraction, by vector: those farthest from the vector's mean);   x̂ = s · level(u) + z

    Levels are one list for each layer's keys and one for its values. levels=kmeans fits them to u (Lloyd's iteration from a
    uniform grid, so that the mean square error is never above the grid's); levels=normal takes a Gaussian's quantiles. (The
    paper fits offline on calibration data, weighted by sensitivity.) An outlier costs 32 bits: where and what.
    Keys are turned back from their positions first, where the cache knows its rotary embedding; behind a transform they are
    taken as the transform leaves them.
    """

    name: ClassVar[str] = "kvquant"
    source: ClassVar[str] = "KVQuant (arXiv:2401.18079)"

    bits: int = 3
    outliers: float = 0.01
    levels: Literal["kmeans", "normal"] = "kmeans"

    def __post_init__(self) -> None:
        self.require("bits", "from 1 to 8", 1 <= self.bits <= 8)
        self.require("outliers", "from 0 to 0.5", 0 <= self.outliers <= 0.5)

    @property
    def own_transform(self) -> Transform | None:
        return Unrotated()

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def _vectors(self, part: Part) -> tuple[int, int]:
        """How many vectors share no scale, and their length: key channels over the tokens; or tokens over all channels."""
        channels = part.kv_heads * part.head_dim
        return (channels, part.tokens) if part.kind == "keys" else (part.tokens, channels)

    def _apart(self, part: Part) -> int:
        """Outliers of a vector."""
        return round(self.outliers * self._vectors(part)[1])

    def _kinds(self, part: Part) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Side information: where outliers are, what they are, each vector's s and z, the levels."""
        import torch

        vectors, length = self._vectors(part)
        dtype = getattr(torch, part.dtype)
        where = torch.int16 if length <= 1 << 16 else torch.int32
        apart = (vectors, self._apart(part))
        return (apart, where), (apart, dtype), ((2, vectors), dtype), ((1 << self.bits,), dtype)

    def side_bytes(self, part: Part) -> int:
        if not part.elements:
            return 0
        vectors, length = self._vectors(part)
        each = 4 if length <= 1 << 16 else 6
        return vectors * self._apart(part) * each + 4 * vectors + (2 << self.bits)

    def _matrix(self, part: Part, x: Tensor) -> Tensor:
        """[kv_heads, tokens, head_dim] -> [vectors, length]."""
        if part.kind == "keys":
            return x.transpose(1, 2).reshape(self._vectors(part))
        return x.transpose(0, 1).reshape(self._vectors(part))

    def _tensor(self, part: Part, matrix: Tensor) -> Tensor:
        """The inverse of `_matrix`."""
        if part.kind == "keys":
            return matrix.view(part.kv_heads, part.head_dim, part.tokens).transpose(1, 2)
        return matrix.view(part.tokens, part.kv_heads, part.head_dim).transpose(0, 1)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if not part.elements:
            return values.new_empty(0, dtype=torch.uint8), None
        self.require_finite(part, values)
        kinds = self._kinds(part)
        dtype = kinds[1][1]
        limit = torch.finfo(dtype).max
        x = self._matrix(part, values.float()).clamp(-limit, limit)
        where, inside = _farthest(x, self._apart(part))
        low = x.masked_fill(~inside, torch.inf).amin(1, keepdim=True)
        high = x.masked_fill(~inside, -torch.inf).amax(1, keepdim=True)
        middle = (low / 2 + high / 2).to(dtype)
        # The farther end from the middle as it is sent, so that u stays within its bounds.
        reach = torch.maximum(high - middle.float(), middle.float() - low).clamp_(0, limit)
        scale = rounded_up(reach, dtype)
        u = over(x - middle.float(), scale).clamp_(-1, 1)
        levels = self._levels(u[inside]).to(dtype)
        borders = levels.float().unfold(0, 2, 1).mean(-1)
        symbols = self._tensor(part, torch.bucketize(u.contiguous(), borders).to(torch.uint8)).contiguous()
        places = where - (where > 0x7FFF) * 0x10000 if kinds[0][1] == torch.int16 else where
        side = side_of(
            places.to(kinds[0][1]), x.gather(1, where).to(dtype), torch.stack([scale, middle]), levels
        )
        return symbols, side

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        if not part.elements:
            return torch.empty(part.shape, device=side.device)
        where, apart, numbers, levels = cut_side(side, *self._kinds(part))
        scale, middle = numbers.float()[..., None]
        matrix = self._matrix(part, levels.float()[symbols.int()].view(part.shape))
        matrix = matrix * scale + middle
        places = (where.long() & (0xFFFF if where.dtype == torch.int16 else 0x7FFFFFFF)) % matrix.shape[1]
        return self._tensor(part, matrix.scatter_(1, places, apart.float()))

    def _levels(self, u: Tensor) -> Tensor:
        """2^bits numbers within [-1, 1], ascending; u: the elements that they are for."""
        if self.levels == "normal":
            return normal_levels(self.bits).to(u.device)
        return fitted_levels(u, self.bits)


def _farthest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each row the indices [rows, count] of the elements farthest from its mean, and where x is none of them."""
    import torch

    far = (x - x.mean(1, keepdim=True, dtype=torch.float64).float()).abs()
    where = far.topk(count, 1).indices.sort(1).values
    return where, torch.ones_like(x, dtype=torch.bool).scatter_(1, where, False)


def fitted_levels(u: Tensor, bits: int) -> Tensor:
    """The levels that Lloyd's iteration finds for u, from a uniform grid on [-1, 1]; a level without elements stays."""
    import torch

    count = 1 << bits
    step = -(-u.numel() // _SAMPLE)
    ordered = u.flatten()[:: max(step, 1)].double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    levels = torch.linspace(-1, 1, count, dtype=torch.float64, device=u.device)
    for _ in range(_ROUNDS):
        inner = torch.searchsorted(ordered, levels.unfold(0, 2, 1).mean(-1))
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])
        sizes = ends.diff()
        means = sums[ends].diff() / sizes.clamp_min(1)
        levels = torch.where(sizes > 0, means, levels)
    return levels.float()


@lru_cache(8)
def normal_levels(bits: int) -> Tensor:
    """Quantiles of a Gaussian, equally likely, scaled to [-1, 1] (as NormalFloat of QLoRA, arXiv:2305.14314, but symmetric)."""
    import numpy as np
    import torch
    from scipy import special

    count = 1 << bits
    outermost = (1 / (2 * count) + 1 / (2 * count - 2)) / 2
    quantiles = special.ndtri(np.linspace(outermost, 1 - outermost, count))
    return torch.from_numpy(quantiles / quantiles[-1]).float()
