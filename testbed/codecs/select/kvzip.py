"""KVzip: what the model looks at while it repeats the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class KVzip(Selector):
    """Context reconstruction: keeps what is looked at while the context is read again behind a request to repeat it.

    score[h, t] = the highest, over the tokens q of ``Repeat the previous context exactly.`` and the context behind it, and
    over the query heads of KV head h, of the causal softmax attention of q to t over prefix, context and what is repeated:
    [kv_heads, tokens]. That is a second prefill, of as many tokens as the first; no question is looked at.

    The paper repeats a long context in parts of 2,048 tokens; here it is one. It shares the budget over all heads by their
    scores: ``perhead@0.25(by=kvzip, floor=0)`` does within a layer. sinks: the context's first tokens, always kept.
    """

    name: ClassVar[str] = "kvzip"
    source: ClassVar[str] = (
        "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (arXiv:2505.23416)"
    )

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)

    def needs(self) -> Needs:
        return Needs(reread=True)

    def always(self, tokens: int, budget: int) -> range:
        return range(min(self.sinks, tokens))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        return evidence.most_attention_rereading(layer)
