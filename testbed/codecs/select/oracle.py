"""The oracle: what the gold answer looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Scope, Selector, pool

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Oracle(Selector):
    """Upper bound: keeps what the model attends to while it writes the gold answer, which no deployment knows.

    score[h, t] = mean over the tokens at which the answer's tokens are predicted (the question's last one, then the
    answer's own but the last), and over the query heads of KV head h, of the softmax attention to t over prefix, context,
    question and answer, teacher-forced: [kv_heads, tokens].

    sinks: the context's first tokens, always kept. pool: tokens of a max-pooling window (odd).
    """

    name: ClassVar[str] = "oracle"
    source: ClassVar[str] = "upper bound"

    sinks: int = 4
    pool: int = 1
    scope: Scope = field(default="global", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)
        self.require("pool", "odd, from 1 to 1023", 1 <= self.pool <= 1023 and self.pool % 2 == 1)

    def needs(self) -> Needs:
        return Needs(question=True, answer=True)

    def always(self, tokens: int, budget: int) -> range:
        return range(min(self.sinks, tokens))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        return pool(evidence.attention_of_answer(layer), self.pool, "max")
