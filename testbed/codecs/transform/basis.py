"""Principal components of a model's keys and values, fitted beforehand, kept in a file, named by a hash of what it says.

    file   msgpack: format, what they were fitted on, and for each layer's keys and values KV heads, elements of a head, how many
           heads share a basis, its rank, float32 means and float16 components (the first has the largest variance)

Both sides need them: a payload holds coordinates, and names the hash.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from testbed.codecs.kept import LARGEST_FILE, Kept

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.steps import Part

FORMAT: Literal["testbed-basis-1"] = "testbed-basis-1"

#: Sums of products of a 16-bit format's largest numbers are made at this share of their size.
_SMALL = 2.0**-6

_Count = Annotated[int, Meta(ge=1, le=1024)]
_Bytes = Annotated[bytes, Meta(max_length=LARGEST_FILE)]


@dataclass(frozen=True)
class Axes:
    """Means [groups, width] and orthonormal components [groups, rank, width] of groups of KV heads, float32.

        z = V (x - μ),   x̂ = Vᵀ z + μ,   x a token's elements of all heads of a group

    Without rounding x̂ - x is what the components of x - μ that are not among these make up.
    """

    mean: Tensor
    components: Tensor

    def first(self, rank: int) -> Axes:
        """The components of the largest variance."""
        return Axes(self.mean, self.components[:, :rank])

    def to(self, device: str) -> Axes:
        """On a device."""
        return Axes(self.mean.to(device), self.components.to(device))

    def coordinates(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, tokens, dim] -> z, float32 [groups, tokens, rank], within `dtype`'s numbers."""
        import torch

        rows = grouped(x, len(self.mean)) * _SMALL - self.mean[:, None] * _SMALL
        return _saturated(torch.bmm(rows, self.components.transpose(1, 2)), dtype)

    def restored(self, z: Tensor, part: Part) -> Tensor:
        """z -> x̂, float32, of the part's heads."""
        import torch

        rows = torch.bmm(z.float() * _SMALL, self.components) + self.mean[:, None] * _SMALL
        heads = part.kv_heads // len(rows)
        x = rows.view(len(rows), -1, heads, part.head_dim).transpose(1, 2)
        return _saturated(x.reshape(part.kv_heads, -1, part.head_dim), getattr(torch, part.dtype))


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    import torch

    limit = torch.finfo(dtype).max * _SMALL
    return x.clamp_(-limit, limit).mul_(1 / _SMALL)


def grouped(x: Tensor, groups: int) -> Tensor:
    """[kv_heads, tokens, dim] -> [groups, tokens, dim of all the group's heads], float32."""
    heads, tokens, dim = x.shape
    together = heads // groups
    return (
        x.float().view(groups, together, tokens, dim).transpose(1, 2).reshape(groups, tokens, together * dim)
    )


@dataclass(frozen=True)
class Moments:
    """Of some tokens: how many, their sums [groups, width] and sums of products [groups, width, width], float64. They add up."""

    count: int
    sums: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor, groups: int) -> Moments:
        """Of keys or values [kv_heads, tokens, dim]."""
        rows = grouped(x, groups).double()
        return cls(rows.shape[1], rows.sum(1), rows.transpose(1, 2) @ rows)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sums + other.sums, self.products + other.products)

    def axes(self, rank: int) -> tuple[Axes, Tensor]:
        """The principal components of the largest variance, and the share of all variance that each of them has."""
        import torch

        mean = self.sums / self.count
        covariance = self.products / self.count - mean[:, :, None] * mean[:, None]
        variance, vectors = torch.linalg.eigh(covariance)
        share = variance.clamp_min(0).flip(1)
        share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        components = vectors.flip(2).transpose(1, 2)[:, :rank]
        return Axes(mean.float(), components.float().contiguous()), share[:, :rank]


class _Fitted(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Of the keys or values of one layer. together: heads that share a basis."""

    heads: _Count
    dim: Annotated[int, Meta(ge=1, le=1 << 14)]
    together: _Count
    rank: Annotated[int, Meta(ge=1, le=1 << 14)]
    means: _Bytes
    components: _Bytes

    def axes(self) -> Axes:
        import torch

        groups, width = self.heads // self.together, self.together * self.dim
        mean = torch.frombuffer(bytearray(self.means), dtype=torch.float32)
        components = torch.frombuffer(bytearray(self.components), dtype=torch.float16)
        return Axes(mean.view(groups, width), components.view(groups, self.rank, width).float())


class Basis(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """All of a file. `of`: what it was fitted on, for people. `parts`: keys and values of layer 0, of layer 1, …"""

    format: Literal["testbed-basis-1"]
    of: Annotated[str, Meta(max_length=400)]
    parts: Annotated[list[_Fitted], Meta(min_length=1, max_length=1024)]

    def fitted(self, part: Part) -> _Fitted | None:
        """What a part's components are stored as; None where these are not of such parts."""
        at = 2 * part.layer + (part.kind == "values")
        own = self.parts[at] if at < len(self.parts) else None
        return own if own is not None and (own.heads, own.dim) == (part.kv_heads, part.head_dim) else None


def made(of: str, parts: Sequence[tuple[int, Axes]]) -> Basis:
    """Of KV heads and axes: those of layer 0's keys, of its values, of layer 1's keys, …"""
    fitted = []
    for heads, axes in parts:
        groups, rank, width = axes.components.shape
        means = axes.mean.cpu().float().contiguous().numpy().astype("<f4").tobytes()
        components = axes.components.cpu().contiguous().numpy().astype("<f2").tobytes()
        together = heads // groups
        fitted.append(_Fitted(heads, width // together, together, rank, means, components))
    return Basis(FORMAT, of[:400], fitted)


def _wrong(basis: Basis) -> str:
    import numpy as np

    for i, part in enumerate(basis.parts):
        width = part.together * part.dim
        if part.heads % part.together or part.rank > width:
            return f"part {i} has groups of {part.together} of {part.heads} heads and rank {part.rank} of {width}"
        groups = part.heads // part.together
        if (len(part.means), len(part.components)) != (4 * groups * width, 2 * groups * part.rank * width):
            return f"part {i} has another number of elements than its shape"
        components = np.frombuffer(part.components, dtype="<f2").astype(np.float32)
        if not np.isfinite(np.frombuffer(part.means, dtype="<f4")).all() or not np.isfinite(components).all():
            return f"part {i} has an element that is not a number"
        lengths = np.square(components).reshape(-1, width).sum(1)
        if not (np.abs(lengths - 1) < 0.1).all():
            return f"part {i} has a component that is not of length 1"
    return ""


KEPT = Kept("bases", Basis, _wrong)


@functools.lru_cache(maxsize=2048)
def _read(name: str, layer: int, kind: Literal["keys", "values"], device: str) -> Axes:
    return KEPT.known(name).parts[2 * layer + (kind == "values")].axes().to(device)


def known(name: str, part: Part, rank: int, device: torch.device) -> Axes:
    """The first components of a part that those of that name fit."""
    return _read(name, part.layer, part.kind, str(device)).first(rank)
