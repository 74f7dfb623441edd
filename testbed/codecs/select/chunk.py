"""ChunkKV: whole chunks of tokens, by any selector's scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.select import Scope
from testbed.codecs.select.wrapper import Wrapper

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Chunk(Wrapper):
    """Semantic chunks: keeps runs of `size` tokens whole, by the mean of what the selector `by` gives them.

    score[h, t] = mean of by's scores[h, u] over the tokens u of t's chunk (the last may be shorter): [kv_heads, tokens]. The
    paper's chunks are a layer's, which is the default; of the last chunk that the budget reaches, its first tokens are kept.
    """

    name: ClassVar[str] = "chunk"
    source: ClassVar[str] = (
        "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference (arXiv:2502.00299)"
    )

    scope: Scope = field(default="layer", kw_only=True)
    size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("size", "from 1 to 65536", 1 <= self.size <= 65536)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        chunks = super().scores(evidence, layer).split(self.size, dim=1)
        return torch.cat([chunk.mean(1, keepdim=True).expand_as(chunk) for chunk in chunks], dim=1)
