"""GEAR: few bits for everything, a low-rank matrix for what they leave, and the outliers apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.quantize import cut_side, side_of
from testbed.codecs.quantize.integer import INTEGERS
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Gear(Quantizer):
    """x̂ = D̂ + A B, and x itself at the outliers: integers of keys by channel and of values by token, and a residual of low rank.

    Outliers: of each vector (a key's channel over the tokens, a token's values of a KV head) the share outliers / 2 that is
    largest and as many of the least; 32 bits each. D̂: `int4` (or 3, 2, 8 bits) of x with them moved to the ends of the others'
    range, a scale and zero point a vector (the paper's KCVT). A B: the best approximation of rank `rank` of each head's x − D̂
    without outliers, [tokens, rank] and [rank, d] in 16 bits, by its singular vectors, where the paper iterates towards them.
    outliers=0 is GEAR-L. Keys are taken as they are cached, behind RoPE, as there.
    """

    name: ClassVar[str] = "gear"
    source: ClassVar[str] = "GEAR: Near-Lossless Generative Inference of LLM (arXiv:2403.05527)"

    bits: int = 2
    rank: int = 4
    outliers: float = 0.02

    def __post_init__(self) -> None:
        self.require("bits", "2, 3, 4 or 8", self.bits in INTEGERS)
        self.require("rank", "from 0 to 1024", 0 <= self.rank <= 1024)
        self.require("outliers", "from 0 to 0.5", 0 <= self.outliers <= 0.5)

    def _dense(self, part: Part) -> Quantizer:
        return INTEGERS[self.bits](
            group=0, symmetric=False, axis="channel" if part.kind == "keys" else "token"
        )

    def _vectors(self, part: Part) -> tuple[int, int]:
        """How many there are, and their length."""
        if part.kind == "keys":
            return part.kv_heads * part.head_dim, part.tokens
        return part.kv_heads * part.tokens, part.head_dim

    def _sizes(self, part: Part) -> tuple[int, int, int]:
        """Outliers at each end of a vector, bytes that say where one is, and the residual's rank."""
        length = self._vectors(part)[1]
        apart = min(round(self.outliers * length / 2), (length - 1) // 2) if length else 0
        return apart, 2 if length <= 1 << 16 else 4, min(self.rank, part.tokens, part.head_dim)

    def _kinds(self, part: Part) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Behind the integers' side information: where outliers are, what they are, A, B."""
        import torch

        (apart, place, rank), (vectors, _) = self._sizes(part), self._vectors(part)
        dtype, outliers = getattr(torch, part.dtype), (vectors, 2 * apart)
        return [
            (outliers, torch.int16 if place == 2 else torch.int32),
            (outliers, dtype),
            ((part.kv_heads, part.tokens, rank), dtype),
            ((part.kv_heads, rank, part.head_dim), torch.float16),
        ]

    def symbol_bits(self, part: Part) -> int:
        return self.bits

    def side_bytes(self, part: Part) -> int:
        (apart, place, rank), (vectors, _) = self._sizes(part), self._vectors(part)
        low_rank = 2 * part.kv_heads * rank * (part.tokens + part.head_dim)
        return self._dense(part).side_bytes(part) + vectors * 2 * apart * (2 + place) + low_rank

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if not part.elements:
            return self._dense(part).encode(part, values)
        self.require_finite(part, values)
        (apart, _, rank), length = self._sizes(part), self._vectors(part)[1]
        dtype, kinds = getattr(torch, part.dtype), self._kinds(part)
        limit = torch.finfo(dtype).max
        x = values.float().clamp(-limit, limit)
        vectors = self._matrix(part, x)
        order = vectors.argsort(dim=1, stable=True)
        where = torch.cat([order[:, :apart], order[:, length - apart :]], 1)
        outliers = vectors.gather(1, where)
        inner = order[:, apart : length - apart]
        ends = vectors.gather(1, inner[:, [0, -1]]) if inner.numel() else vectors.new_zeros(len(vectors), 2)
        plain = self._tensor(part, vectors.clamp(ends[:, :1], ends[:, 1:])).contiguous()
        symbols, numbers = self._dense(part).encode(part, plain)
        assert numbers is not None
        dense = self._dense(part).decode(part, symbols.flatten().clone(), side_of(numbers)).float()
        left = self._matrix(part, x - dense).scatter(1, where, 0.0)
        left = self._tensor(part, left).double()
        first = torch.linalg.eigh(left.transpose(1, 2) @ left).eigenvectors.flip(2)[..., :rank].half()
        along = (left @ first.double()).clamp(-limit, limit)
        places = where - (where > 0x7FFF) * 0x10000 if kinds[0][1] == torch.int16 else where
        sent = places.to(kinds[0][1]), outliers.to(dtype), along.to(dtype), first.transpose(1, 2)
        return symbols, side_of(numbers, *sent)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        before = self._dense(part).side_bytes(part)
        if not part.elements:
            return self._dense(part).decode(part, symbols, side)
        where, outliers, along, first = cut_side(side[before:], *self._kinds(part))
        x = self._dense(part).decode(part, symbols, side[:before]).float()
        limit = torch.finfo(getattr(torch, part.dtype)).max
        x = (x + along.float() @ first.float()).clamp_(-limit, limit)
        vectors = self._matrix(part, x)
        places = where.long() & (0xFFFF if where.dtype == torch.int16 else 0x7FFFFFFF)
        return self._tensor(part, vectors.scatter(1, places % vectors.shape[1], outliers.float()))

    def _matrix(self, part: Part, x: Tensor) -> Tensor:
        """[kv_heads, tokens, head_dim] -> [vectors, length]."""
        return (x.transpose(1, 2) if part.kind == "keys" else x).reshape(self._vectors(part))

    def _tensor(self, part: Part, vectors: Tensor) -> Tensor:
        """The inverse of `_matrix`."""
        if part.kind == "keys":
            return vectors.view(part.kv_heads, part.head_dim, part.tokens).transpose(1, 2)
        return vectors.view(part.shape)
