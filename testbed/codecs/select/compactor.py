"""Compactor: leverage, and what tokens pay to each other without looking at their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector, pool
from testbed.codecs.select.leverage import leverage

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Compactor(Selector):
    """Query-agnostic: adds up leverage and the attention that stretches of the context pay to themselves, later tokens' too.

    Of the tokens between the first `sinks` and the `last` (both always kept), in stretches of `chunk` tokens:
        a[h, t] = mean of 3 neighbours u of ‖V[h, u]‖₂ · sum over the stretch's queries of softmax over the stretch of s·Q·K
        score[h, t] = z(a)[h, t] + blend · z(leverage)[h, t]                                    [kv_heads, tokens]
    with z(x) = (x - mean) / deviation over all of a layer's heads and tokens, leverage as the selector of that name has it, and
    query heads of a KV head averaged. s is the model's softmax scaling, which kvpress's form of it leaves out.
    """

    name: ClassVar[str] = "compactor"
    source: ClassVar[str] = (
        "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores (arXiv:2507.08143)"
    )

    sinks: int = 8
    last: int = 4
    chunk: int = 256
    blend: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("last", "from 0 to 4096", 0 <= self.last <= 4096)
        self.require("chunk", "from 1 to 65536", 1 <= self.chunk <= 65536)
        self.require("blend", "from 0 to 1000", 0 <= self.blend <= 1000)

    def needs(self) -> Needs:
        return Needs(context_queries=None)

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        first = min(self.sinks, tokens)
        return chain(range(first), range(tokens - 1, max(first, tokens - self.last) - 1, -1))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        between = slice(self.sinks, max(self.sinks, evidence.tokens - self.last))
        paid = evidence.attention_within_context(layer, between, self.chunk)
        held = evidence.cache.layers[layer]
        norms = evidence.attended(layer, held)[1][:, between].norm(dim=-1)
        worth = pool(paid * norms.unflatten(0, (held.kv_heads, -1)).mean(1), 3, "mean")
        scores = _standard(worth) + self.blend * _standard(leverage(evidence, layer, between))
        around = (between.start, evidence.tokens - between.stop)
        return torch.nn.functional.pad(scores, around, value=float(scores.min()))


def _standard(x: Tensor) -> Tensor:
    """Less its mean, over its deviation."""
    return (x - x.mean()) / x.std(correction=0).clamp_min(1e-6)
