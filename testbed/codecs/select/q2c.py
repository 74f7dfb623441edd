"""Q2C: what the question looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector, pool

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Q2C(Selector):
    """Question-to-context attention: keeps what the question's tokens attend to.

    score[h, t] = mean over the m question tokens q, and over the query heads g of KV head h, of
    softmax(scaling · Q[g, q] · K[h])[t], the softmax running over prefix, context and question: [kv_heads, tokens].

    sinks: the context's first tokens, always kept. pool: tokens of a max-pooling window (odd; 1: none). A question looks at
    its own words in the context more than at the answer, which stands beside them: without pooling, a needle's digits get
    less attention than the median token. 15, and a list for each head, kept most (docs/measured/codecs.md has the figures).

    As published it is ``q2c@0.25(sinks=0, pool=1, scope=global, layers=last)``: sums over all heads and question tokens of
    the last layer alone rank the tokens, once for the whole cache.
    """

    name: ClassVar[str] = "q2c"
    source: ClassVar[str] = (
        "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference"
    )

    sinks: int = 4
    pool: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("pool", "odd, from 1 to 1023", 1 <= self.pool <= 1023 and self.pool % 2 == 1)

    def needs(self) -> Needs:
        return Needs(question=True)

    def always(self, tokens: int, budget: int) -> range:
        return range(min(self.sinks, tokens))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        attention = evidence.attention_of_question(layer)
        return pool(attention / evidence.question_tokens, self.pool, "max")
