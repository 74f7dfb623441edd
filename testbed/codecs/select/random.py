"""Random tokens: the floor that every selector must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.select import Layers, Scope, Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Random(Selector):
    """Uniformly random tokens, without replacement; the same for the same example and layer.

    score[h, t] ~ U(0, 1), from a generator seeded by the evidence's seed and the layer: [kv_heads, tokens].
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline"

    scope: Scope = field(default="global", kw_only=True)
    layers: Layers = field(default="all", init=False)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        seed = hashlib.blake2b(f"{evidence.seed}/{layer}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        heads = evidence.cache.layers[layer].kv_heads
        return torch.rand(heads, evidence.tokens, generator=generator)
