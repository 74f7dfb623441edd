"""ThinK: channels of the keys that the question does not look at are left away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs import CodecError
from testbed.codecs.evidence import Needs
from testbed.codecs.quantize.projected import CHANNELWISE, channelwise
from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class ThinK(Quantizer):
    """Query-driven channel pruning: of each head's keys, sends a share `keep` of the channels; values are sent whole.

    worth[h, c] = Σ over the observing tokens q and query heads g of KV head h of Q[g, q, c]² · Σ over the context of K[h, t, c]²,
    which is ‖Q_c K_cᵀ‖_F². The round(keep · d) channels of the highest are sent, the others are 0 for whoever decodes. Heads
    that hold different numbers of tokens share a layer's channels. Where no query is at hand, keys' norms alone decide.

    window: the last context tokens that observe; 0: the question's. of: what codes channels and values; a bit for each channel
    says which are there. The paper keeps all channels of the last 32 tokens, too; here they are pruned alike.
    """

    name: ClassVar[str] = "think"
    source: ClassVar[str] = "ThinK: Thinner Key Cache by Query-Driven Pruning (arXiv:2407.21018)"

    keep: float = 0.6
    window: int = 0
    of: str = "fp16"

    def __post_init__(self) -> None:
        self.require("keep", "above 0 and at most 1", 0 < self.keep <= 1)
        self.require("window", "0 (the question) or from 1 to 65536", 0 <= self.window <= 65536)
        self.require("of", f"one of {', '.join(CHANNELWISE)}", self.of in CHANNELWISE)

    @cached_property
    def inner(self) -> Quantizer:
        """What codes the channels that are sent."""
        return channelwise(self.of)

    def needs(self) -> Needs:
        return Needs(context_queries=self.window) if self.window else Needs(question=True)

    def channels(self, evidence: Evidence, layer: int, together: bool) -> Tensor:
        import torch

        queries = evidence.context_queries if self.window else evidence.question_queries
        keys = evidence.cache.layers[layer].keys.float()
        if not queries or (asking := queries[layer]).shape[2] != keys.shape[2] or not asking.shape[1]:
            raise CodecError(
                f"{self.name} needs queries that look at layer {layer}'s keys as they are cached"
            )
        asking = asking[:, -self.window :].float().square().sum(1).unflatten(0, (len(keys), -1)).sum(1)
        worth = asking * keys.square().sum(1)
        if together:
            worth = worth.sum(0, keepdim=True).expand_as(worth)
        first = worth.sort(dim=1, descending=True, stable=True).indices[:, : self._kept(keys.shape[2])]
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(1, first, True)

    def _kept(self, channels: int) -> int:
        return max(1, round(self.keep * channels))

    def _narrow(self, part: Part) -> Part:
        """What the inner quantizer is given: of keys, the channels that are sent."""
        return part if part.kind == "values" else replace(part, head_dim=self._kept(part.head_dim))

    def _mask_bytes(self, part: Part) -> int:
        return part.kv_heads * -(-part.head_dim // 8) if part.kind == "keys" else 0

    def symbol_bits(self, part: Part) -> int:
        return self.inner.symbol_bits(self._narrow(part))

    def symbols(self, part: Part) -> int:
        return self.inner.symbols(self._narrow(part))

    def side_bytes(self, part: Part) -> int:
        return self.inner.side_bytes(self._narrow(part)) + self._mask_bytes(part)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        if part.kind == "values":
            return self.inner.encode(part, values)
        self.require_finite(part, values)
        narrow = self._narrow(part)
        # Channels that were not chosen are 0, and so among the shortest.
        lengths = values.float().square().sum(1)
        first = lengths.sort(dim=1, descending=True, stable=True).indices[:, : narrow.head_dim].sort(1).values
        mask = torch.zeros_like(lengths, dtype=torch.uint8).scatter_(1, first, 1)
        symbols, side = self.inner.encode(
            narrow, values.gather(2, first[:, None].expand(narrow.shape)).contiguous()
        )
        told = [] if side is None else [side.contiguous().flatten().view(torch.uint8)]
        return symbols, torch.cat([*told, _packed(mask).flatten()])

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        if part.kind == "values":
            return self.inner.decode(part, symbols, side)
        narrow, before = self._narrow(part), len(side) - self._mask_bytes(part)
        sent = self.inner.decode(narrow, symbols, side[:before])
        bits = side[before:].view(part.kv_heads, -1, 1) >> torch.arange(
            8, dtype=torch.uint8, device=side.device
        )
        mask = (bits & 1).view(part.kv_heads, -1)[:, : part.head_dim]
        # As many places a head as there are channels, whatever the bits say.
        first = mask.sort(dim=1, descending=True, stable=True).indices[:, : narrow.head_dim]
        out = sent.new_zeros(part.shape)
        return out.scatter_(2, first[:, None].expand(narrow.shape), sent.view(narrow.shape))


def _packed(mask: Tensor) -> Tensor:
    """Zeros and ones, uint8 [heads, n] -> [heads, bytes], the earliest in the low bits."""
    import torch

    bits = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2).to(torch.uint8)
