"""Selectors: which context tokens travel. A method says how much each token is worth; the rest is done here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs.evidence import Needs
from testbed.codecs.kept import Kept
from testbed.codecs.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence

Scope = Literal["global", "layer", "head"]


@dataclass(frozen=True)
class Selector(Method):
    """Keeps exactly ``max(1, round(ratio × context tokens))`` tokens, those of the highest scores, in their order.

    `scope`: one list for all layers (``global``: scores averaged over layers and heads), one a layer (averaged over
    heads), or one for each KV head. Equal scores: the earlier token is kept. Sliding-window layers are not pruned.
    """

    stage: ClassVar[Literal["selector"]] = "selector"

    ratio: float
    scope: Scope = field(default="global", kw_only=True)

    def __post_init__(self) -> None:
        self.require("ratio", "above 0 and at most 1", 0 < self.ratio <= 1)
        self.require("scope", "global, layer or head", self.scope in ("global", "layer", "head"))

    def needs(self) -> Needs:
        """Which queries `scores` looks at."""
        return Needs()

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        """Indices kept whatever their scores, the most important first; those past the budget are dropped."""
        return ()

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        """What each context token is worth: float32 [kv_heads, tokens]. Not called when `always` fills the budget."""
        raise NotImplementedError

    def select(self, evidence: Evidence) -> Kept:
        """The indices kept, layer by layer. Raises CodecError where the evidence lacks what the method needs."""
        import torch

        tokens, prunable = evidence.tokens, evidence.prunable
        budget = max(1, round(self.ratio * tokens))
        if budget >= tokens or not prunable:
            return Kept.everything(evidence.cache)
        forced = torch.tensor(list(dict.fromkeys(self.always(tokens, budget)))[:budget], dtype=torch.int64)
        chosen: dict[int, Tensor]
        if len(forced) == budget:
            chosen = dict.fromkeys(prunable, forced.sort().values)
        elif self.scope == "global":
            total = torch.stack([self.scores(evidence, layer).mean(0) for layer in prunable]).mean(0)
            chosen = dict.fromkeys(prunable, _highest(total, forced, budget))
        else:
            chosen = {}
            for layer in prunable:
                scores = self.scores(evidence, layer)
                chosen[layer] = _highest(scores if self.scope == "head" else scores.mean(0), forced, budget)
        return Kept(tuple(chosen.get(layer) for layer in range(len(evidence.cache.layers))), tokens)


def _highest(scores: Tensor, forced: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores of the last dimension, `forced` first, ascending."""
    import torch

    ranked = torch.nan_to_num(scores.float().cpu(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max)
    ranked[..., forced] = torch.inf
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(dim=-1).values


def pool(scores: Tensor, kernel: int, how: str) -> Tensor:
    """Max or mean over each token's `kernel` neighbours (odd, itself in the middle): [heads, tokens] -> the same.

    The mean counts neighbours beyond the ends as zeros, as SnapKV's released code does.
    """
    from torch.nn.functional import avg_pool1d, max_pool1d

    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    pooling = max_pool1d if how == "max" else avg_pool1d
    return pooling(scores[:, None], kernel_size=kernel, stride=1, padding=kernel // 2)[:, 0]
