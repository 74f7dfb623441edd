"""Selectors: which context tokens travel. A method says how much each token is worth; the rest is done here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import CodecError
from testbed.codecs.evidence import Kept, Needs, gather
from testbed.codecs.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence
    from testbed.models.kvcache import KVCache
    from testbed.models.language import LanguageModel

Scope = Literal["global", "layer", "head"]
Layers = Literal["all", "last"]


@dataclass(frozen=True)
class Selector(Method):
    """Keeps exactly ``max(1, round(ratio × context tokens))`` tokens, those of the highest scores, in their order.

    `scope`: one list for each KV head, as most papers have it; one a layer (scores averaged over its heads); or one for all
    layers (``global``: averaged over layers and heads). A list costs a bit a context token, so the choice is one of
    quality. Equal scores: the earlier token is kept. Sliding-window layers are not pruned.

    `layers`: whose scores make the one list for all layers: ``all``, or the ``last`` alone (with full attention).
    """

    stage: ClassVar[Literal["selector"]] = "selector"
    together: ClassVar[bool] = (
        False  #: whether keys are turned to positions one behind the other (`Kept.together`)
    )

    ratio: float
    scope: Scope = field(default="head", kw_only=True)
    layers: Layers = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        self.require("ratio", "above 0 and at most 1", 0 < self.ratio <= 1)
        self.require("scope", "global, layer or head", self.scope in ("global", "layer", "head"))
        self.require("layers", "all or last", self.layers in ("all", "last"))
        self.require("layers", "all unless scope=global", self.layers == "all" or self.scope == "global")

    @property
    def one_list(self) -> bool:
        """Whether all layers that are pruned keep the same tokens."""
        own = type(self)
        alike = own.budgets is Selector.budgets and own.allot is Selector.allot
        return self.scope == "global" and alike and not self.together

    def needs(self) -> Needs:
        """Which queries `scores` looks at."""
        return Needs()

    def always(self, tokens: int, budget: int) -> Iterable[int]:
        """Indices kept whatever their scores, the most important first; those past the budget are dropped."""
        return ()

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        """What each context token is worth: float32 [kv_heads, tokens]. Not called when `always` fills the budget."""
        raise NotImplementedError(
            f"{self.name}: `always` left room in the budget, and it has no `scores` to fill it by"
        )

    def budgets(self, tokens: int, budget: int, layers: int) -> list[int]:
        """How many tokens each of the prunable layers keeps, first layer first; `budget` on average."""
        return [budget] * layers

    def allot(self, evidence: Evidence, budget: int) -> list[int]:
        """The same by what is known of the context: `budgets`, where a method does not look at that."""
        return self.budgets(evidence.tokens, budget, len(evidence.prunable))

    def choose(self, scores: Tensor, forced: Tensor, budget: int) -> Tensor:
        """The indices that a layer keeps, [budget] or [kv_heads, n], by its `scores` [kv_heads, tokens]."""
        return highest(scores if self.scope == "head" else scores.mean(0), forced, budget)

    def select(self, evidence: Evidence) -> Kept:
        """The indices kept, layer by layer. Raises CodecError where the evidence lacks what the method needs."""
        import torch

        from testbed.codecs.fast.threads import keep_freed_memory

        keep_freed_memory()  # a layer's temporaries are the next one's
        tokens, prunable = evidence.tokens, evidence.prunable
        budget = max(1, round(self.ratio * tokens))
        if budget >= tokens or not prunable:
            return Kept.everything(evidence.cache)
        always = torch.tensor(list(dict.fromkeys(self.always(tokens, budget)))[:budget], dtype=torch.int64)
        budgets = dict(zip(prunable, self.allot(evidence, budget), strict=True))
        chosen: dict[int, Tensor] = {}
        if self.scope == "global" and any(len(always) < each for each in budgets.values()):
            ranking = prunable[-1:] if self.layers == "last" else prunable
            total = torch.stack([self.scores(evidence, layer).mean(0) for layer in ranking]).mean(0)
        shared: dict[int, Tensor] = {}  # one tensor for the layers that share a list
        for layer, own in budgets.items():
            if self.scope != "global" and len(always) < own:
                index = self.choose(self.scores(evidence, layer), always, own)
                # A layer's only head needs no list of its own, and has no empty places.
                chosen[layer] = index[0] if index.dim() == 2 and len(index) == 1 else index
                continue
            if own not in shared:
                shared[own] = (
                    always[:own].sort().values if len(always) >= own else highest(total, always, own)
                )
            chosen[layer] = shared[own]
        layers = tuple(chosen.get(layer) for layer in range(len(evidence.cache.layers)))
        return Kept(layers, tokens, together=self.together)


class OnlineSelection:
    """A question-aware selector over a context that comes in chunks, such as online Q2C.

    After a chunk the question's tokens, few beside a chunk's, run behind all that has arrived. So what is known then is what
    the selector says of a context that ends there, and behind the last chunk it is what it says of the whole.
    """

    def __init__(
        self, model: LanguageModel, selector: Selector, prefix: KVCache | None, question_ids: Sequence[int]
    ) -> None:
        self._model, self._selector = model, selector
        self._prefix, self._question = prefix, question_ids
        self._arrived: KVCache | None = None
        self._evidence: Evidence | None = None

    def arrive(self, chunk: KVCache) -> Kept:
        """Take in the cache of the next chunk's tokens; returns what to keep of all that has arrived."""
        import torch

        from testbed.models.prefill import Prefill

        self._arrived = chunk if self._arrived is None else self._model.join(self._arrived, chunk)
        context = Prefill(self._arrived, [], torch.arange(0), None)
        needs = Needs(question=True)
        self._evidence = gather(self._model, needs, self._prefix, context, self._question)
        return self._selector.select(self._evidence)

    def scores(self, layer: int) -> Tensor:
        """What each token that has arrived is worth to the selector, float32 [kv_heads, tokens]."""
        if self._evidence is None:
            raise ValueError("no chunk has arrived")
        return self._selector.scores(self._evidence, layer)


def highest(scores: Tensor, forced: Tensor, budget: int) -> Tensor:
    """Indices of the `budget` highest scores of the last dimension, `forced` first, ascending."""
    ranked = rankable(scores)
    ranked[..., forced] = float("inf")
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(dim=-1).values


def rankable(scores: Tensor) -> Tensor:
    """A copy of scores in float32 on the CPU, infinity as the largest number. Raises CodecError where one is NaN."""
    import torch

    copy = scores.to("cpu", torch.float32, copy=True)
    if bool(copy.isnan().any()):
        raise CodecError("the scores that tokens are to be ranked by hold NaN")
    most = torch.finfo(torch.float32).max
    return copy.clamp_(-most, most)


def ranked_within(scores: Tensor, size: int) -> Tensor:
    """Scores by which each stretch of `size` tokens (the last may be shorter) keeps an equal share: [heads, tokens] -> the same.

    A token's score becomes the share of its stretch that it is worth as much as, from above 0 to 1, equal ones the earlier first.
    Raises CodecError where one is NaN.
    """
    import torch

    stretches = []
    for stretch in rankable(scores).split(size, dim=1):
        places = stretch.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        stretches.append(1 - places / stretch.shape[1])
    return torch.cat(stretches, dim=1) if stretches else scores


def pool(scores: Tensor, kernel: int, how: str) -> Tensor:
    """Max or mean over each token's `kernel` neighbours (odd, itself in the middle): [heads, tokens] -> the same.

    The mean counts neighbours beyond the ends as zeros, as SnapKV's released code does.
    """
    from torch.nn.functional import avg_pool1d, max_pool1d

    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    pooling = max_pool1d if how == "max" else avg_pool1d
    return pooling(scores[:, None], kernel_size=kernel, stride=1, padding=kernel // 2)[:, 0]
