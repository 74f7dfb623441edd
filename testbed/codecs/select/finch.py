"""FINCH: what the question looks at, an equal share of each stretch of the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector, ranked_within

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Finch(Selector):
    """Prompt-guided: of each `chunk` tokens, keeps those that the question attends to most.

    worth[h, t] = mean over the question's tokens q, and over the query heads of KV head h, of n_q · A[q, t], A the causal
    softmax attention over prefix, context and question, n_q how many tokens q sees: later tokens share their attention among
    more. score[h, t] is the rank of t in its chunk: [kv_heads, tokens].

    Published for contexts that are read chunk by chunk beside the question, with keys turned to new positions behind each
    chunk; here the context was read at once, and kept tokens stay where they were.
    """

    name: ClassVar[str] = "finch"
    source: ClassVar[str] = "FINCH: Prompt-guided Key-Value Cache Compression (arXiv:2408.00167)"

    chunk: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chunk", "from 1 to 65536", 1 <= self.chunk <= 65536)

    def needs(self) -> Needs:
        return Needs(question=True)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        positions = evidence.question_query_positions
        # Positions are absolute: a token sees as many as its own says, and itself.
        seen = None if positions is None else (positions + 1).float()
        worth = evidence.attention_of_question(layer, seen) / max(1, evidence.question_tokens)
        return ranked_within(worth, self.chunk)
