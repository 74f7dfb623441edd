"""KeyDiff: keys unlike the others are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class KeyDiff(Selector):
    """Key difference: keeps the tokens whose keys point away from where the context's keys point on average.

    score[h, t] = -cos(K[h, t], a[h]), a[h] = mean over the context's tokens u of K[h, u] / ‖K[h, u]‖₂: [kv_heads, tokens].
    That ranks a head's tokens by their mean cosine to all its keys. A key of zeros has cosine 0. Looks at no query.

    Published for prompts read in blocks, with an eviction behind each; here the whole context is ranked once.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = (
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference (arXiv:2504.15364)"
    )

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        from torch.nn.functional import normalize

        directions = normalize(evidence.cache.layers[layer].keys.float(), dim=-1)
        anchor = normalize(directions.mean(1, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)
