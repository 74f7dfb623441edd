"""Key norms: small keys are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class KeyNorm(Selector):
    """L2 norm: keeps the tokens whose keys are shortest, which attention tends to be paid to; looks at no query.

    score[h, t] = -‖K[h, t]‖₂: [kv_heads, tokens].
    """

    name: ClassVar[str] = "keynorm"
    source: ClassVar[str] = (
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv:2406.11430)"
    )

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        return -evidence.cache.layers[layer].keys.float().norm(dim=-1)
