"""TOVA: what the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select import Scope, Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class TOVA(Selector):
    """Token omission via attention: keeps what the context's last token attends to, and that token itself.

    score[h, t] = mean over all query heads of the layer of the last context token's softmax attention to t, the same
    for each of its KV heads: [kv_heads, tokens].
    """

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "Transformers are Multi-State RNNs (arXiv:2401.06104)"

    scope: Scope = field(default="layer", kw_only=True)

    def needs(self) -> Needs:
        return Needs(context_queries=1)

    def always(self, tokens: int, budget: int) -> range:
        return range(tokens - 1, tokens)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        attention = evidence.attention_of_context(layer, 1)
        return attention.mean(0, keepdim=True).expand_as(attention)
