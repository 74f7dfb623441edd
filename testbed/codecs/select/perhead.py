"""AdaKV for any selector: the heads of a layer share one budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.select import Layers, Scope, rankable
from testbed.codecs.select.wrapper import Wrapper

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PerHead(Wrapper):
    """Budgets a head: a layer's KV heads share its budget by the scores of any selector; heads keep different numbers.

    Of a layer's kv_heads × tokens scores, those of the selector `by` (with its defaults), the kv_heads × b highest are
    kept, b being each head's equal share; each head's own `floor` × b highest come first.
    """

    name: ClassVar[str] = "perhead"
    source: ClassVar[str] = (
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (arXiv:2407.11550)"
    )

    scope: Scope = field(default="head", init=False)
    layers: Layers = field(default="all", init=False)
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("floor", "from 0 to 1", 0 <= self.floor <= 1)

    def choose(self, scores: Tensor, forced: Tensor, budget: int) -> Tensor:
        import torch

        ranked = rankable(scores)
        ranked[:, forced] = torch.inf
        own = ranked.sort(dim=1, descending=True, stable=True).indices[:, : round(self.floor * budget)]
        ranked.scatter_(1, own, torch.inf)
        order = ranked.flatten().sort(descending=True, stable=True).indices[: budget * len(ranked)]
        kept = torch.zeros(ranked.numel(), dtype=torch.bool).index_fill_(0, order, True).view(ranked.shape)
        rows = [row.nonzero()[:, 0] for row in kept]
        most = max(len(row) for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (most - len(row), 0), value=-1) for row in rows])
