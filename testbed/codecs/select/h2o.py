"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class H2O(Selector):
    """Heavy-hitter oracle: keeps the tokens that all context tokens together attend to most, and the most recent ones.

    score[h, t] = sum over all context tokens q ≥ t, mean over the query heads of KV head h, of the causal softmax
    attention of q to t: [kv_heads, tokens]; summed up while the context is prefilled, or else computed from its queries:
    in blocks of queries, never the full matrix.

    recent: the share of the budget that goes to the last tokens. normalised: score[h, t] is divided by the number of
    context tokens that could see t, so that early tokens do not win by having been seen more often. question: the question's
    tokens are steps behind the context's, whose attention is added up, too.
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference (arXiv:2306.14048)"

    recent: float = 0.5
    normalised: bool = False
    question: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("recent", "from 0 to 1", 0 <= self.recent <= 1)

    def needs(self) -> Needs:
        return Needs(question=self.question, context_attention=True)

    def always(self, tokens: int, budget: int) -> range:
        return range(tokens - 1, tokens - 1 - round(self.recent * budget), -1)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        attention = evidence.attention_of_context(layer, last=None)
        steps = torch.arange(attention.shape[1], 0, -1, device=attention.device)
        if self.question:
            attention = attention + evidence.attention_of_question(layer)
            steps = steps + evidence.question_tokens
        return attention / steps if self.normalised else attention
