"""What quantizers of coordinates along principal components have in common; the components come from a file or go along."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from testbed import lookup
from testbed.codecs import registry
from testbed.codecs.kept import is_name
from testbed.codecs.quantize import cut_side, side_of
from testbed.codecs.steps import Part, Quantizer, Transform
from testbed.codecs.transform.basis import KEPT, Axes, Moments, known
from testbed.codecs.transform.unrotated import Unrotated

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Quantizers of which any number of channels may be coded by itself.
CHANNELWISE = ("fp16", "int8", "int4", "int3", "int2", "fp8")


def channelwise(name: str) -> Quantizer:
    """One of `CHANNELWISE`, with its defaults."""
    return cast(type[Quantizer], registry.find(name))()


@dataclass(frozen=True)
class Projected(Quantizer):
    """z = V(x − μ) through an inner quantizer, x̂ = Vᵀẑ + μ; keys before RoPE, where the cache knows its rotary embedding.

    basis: a file of components that were fitted on other texts (``python -m testbed.diagnosis.basis``), or the hash that names
    them; heads that it has together share coordinates. own: fitted on the context, a head at a time, and sent in 16 bits with it;
    so are parts that a file's components do not fit (heads that hold different numbers of tokens).
    """

    basis: str = "own"

    @property
    def inner(self) -> Quantizer:
        """What codes coordinates."""
        raise NotImplementedError

    def rank(self, width: int) -> int:
        """How many components are used, of vectors of so many elements."""
        raise NotImplementedError

    def whole(self, part: Part) -> tuple[int, int]:
        """How many of the first and of the last tokens are sent as they are, in 16 bits."""
        return 0, 0

    @property
    def refers(self) -> bool:
        return self.basis != "own" and not is_name(self.basis)

    def bound(self, model: str | None) -> Projected:
        if not self.refers:
            return self
        path = Path(lookup.find(self.basis) or self.basis).expanduser()
        return replace(self, basis=KEPT.save(KEPT.load(path)[1])[0])

    @property
    def shared_bytes(self) -> int:
        return 0 if self.basis == "own" else KEPT.size(self.basis)

    @property
    def own_transform(self) -> Transform | None:
        return Unrotated()

    def _fitted(self, part: Part) -> bool:
        """Whether both sides have the components beforehand."""
        return self.basis != "own" and KEPT.known(self.basis).fitted(part) is not None

    def latent(self, part: Part) -> Part:
        """The coordinates, as the inner quantizer sees them: a head for each group of heads, a channel for each component."""
        fitted = None if self.basis == "own" else KEPT.known(self.basis).fitted(part)
        together, most = (fitted.together, fitted.rank) if fitted else (1, part.head_dim)
        return replace(
            part,
            kv_heads=part.kv_heads // together,
            tokens=part.tokens - sum(self.whole(part)),
            head_dim=min(self.rank(together * part.head_dim), most),
        )

    def symbol_bits(self, part: Part) -> int:
        return self.inner.symbol_bits(self.latent(part))

    def symbols(self, part: Part) -> int:
        return self.inner.symbols(self.latent(part))

    def _sent(self, part: Part) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Behind the inner quantizer's side information: tokens that are sent as they are, own means, own components."""
        import torch

        dtype = getattr(torch, part.dtype)
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((part.kv_heads, sum(self.whole(part)), part.head_dim), dtype)
        ]
        latent = self.latent(part)
        if latent.elements and not self._fitted(part):
            own = (part.kv_heads, latent.head_dim, part.head_dim)
            kinds += [((part.kv_heads, part.head_dim), dtype), (own, torch.float16)]
        return kinds

    def side_bytes(self, part: Part) -> int:
        latent, sent = self.latent(part), part.kv_heads * part.head_dim * sum(self.whole(part))
        if latent.elements and not self._fitted(part):
            sent += part.kv_heads * part.head_dim * (1 + latent.head_dim)
        return self.inner.side_bytes(latent) + 2 * sent

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        self.require_finite(part, values)
        (first, last), latent, dtype = self.whole(part), self.latent(part), getattr(torch, part.dtype)
        limit = torch.finfo(dtype).max
        coded = values[:, first : part.tokens - last]
        sent = [
            torch.cat([values[:, :first], values[:, part.tokens - last :]], 1).clamp(-limit, limit).to(dtype)
        ]
        if not latent.elements:
            z = values.new_zeros(latent.shape, dtype=torch.float32)
        elif self._fitted(part):
            z = known(self.basis, part, latent.head_dim, values.device).coordinates(coded, dtype)
        else:
            own = Moments.of(coded, part.kv_heads).axes(latent.head_dim)[0]
            sent += [own.mean.to(dtype), own.components.half()]
            z = Axes(sent[1].float(), sent[2].float()).coordinates(coded, dtype)
        symbols, side = self.inner.encode(latent, z)
        return symbols, side_of(*([] if side is None else [side]), *sent)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        (first, _), latent = self.whole(part), self.latent(part)
        before = self.inner.side_bytes(latent)
        apart, *own = cut_side(side[before:], *self._sent(part))
        out = torch.empty(part.shape, dtype=torch.float32, device=side.device)
        ends = first, first + latent.tokens
        out[:, :first], out[:, ends[1] :] = apart[:, :first], apart[:, first:]
        if latent.elements:
            z = self.inner.decode(latent, symbols, side[:before])
            axes = (
                Axes(own[0].float(), own[1].float())
                if own
                else known(self.basis, part, latent.head_dim, side.device)
            )
            out[:, slice(*ends)] = axes.restored(z, part)
        return out
