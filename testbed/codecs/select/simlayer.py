"""SimLayerKV: layers that look at sinks and recent tokens keep nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Layers, Scope, Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class SimLayer(Selector):
    """Lazy layers: keeps sinks and recent tokens alone in layers that look at little else, and all tokens in the others.

    lazy[layer] = mean over the last `observers` context tokens and all heads of their softmax attention to the context's first
    `sinks` and last `last` tokens together. The paper calls layers lazy above a threshold; here the ratio says how much is
    kept: as many of the least lazy layers keep all T tokens as leaves the others `sinks` + `last` each,
        floor(L · (b - few) / (T - few)),  few = sinks + recent,  L layers with b tokens on average,
    and the lazy ones share what is left as more recent tokens.
    """

    name: ClassVar[str] = "simlayer"
    source: ClassVar[str] = (
        "SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction (arXiv:2410.13846)"
    )

    scope: Scope = field(default="layer", init=False)
    layers: Layers = field(default="all", init=False)
    sinks: int = 4
    last: int = 32
    observers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("last", "from 1 to 65536", 1 <= self.last <= 65536)
        self.require("observers", "from 1 to 65536", 1 <= self.observers <= 65536)

    def needs(self) -> Needs:
        return Needs(context_queries=self.observers)

    def always(self, tokens: int, budget: int) -> range:
        return range(min(self.sinks, tokens))

    def allot(self, evidence: Evidence, budget: int) -> list[int]:
        layers, tokens, few = evidence.prunable, evidence.tokens, self.sinks + self.last
        whole = len(layers) * (budget - few) // (tokens - few) if few < budget else 0
        lazy = {layer: self.lazy(evidence, layer) for layer in layers} if whole else {}
        full = set(sorted(layers, key=lambda layer: lazy.get(layer, 0.0))[:whole])
        share, over = divmod(len(layers) * budget - whole * tokens, len(layers) - whole)
        budgets = []
        for layer in layers:
            budgets.append(tokens if layer in full else share + (over > 0))
            over -= layer not in full
        return budgets

    def lazy(self, evidence: Evidence, layer: int) -> float:
        """Which share of the last tokens' attention sinks and recent tokens get."""
        paid = evidence.attention_of_context(layer, self.observers).mean(0)
        paid = paid / min(self.observers, evidence.tokens)
        return float(paid[: self.sinks].sum() + paid[max(self.sinks, len(paid) - self.last) :].sum())

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        later = torch.arange(evidence.tokens, dtype=torch.float32)
        return later.expand(evidence.cache.layers[layer].kv_heads, -1)
