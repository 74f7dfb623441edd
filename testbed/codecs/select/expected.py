"""ExpectedAttention: what queries that have yet to come will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs import CodecError
from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Expected(Selector):
    """Expected attention: keeps what queries like the context's would attend to from the positions that follow.

    The context's queries before their rotary embedding (without those of the first `sinks` tokens) have mean μ and
    covariance Σ, [d] and [d, d] for each query head; R is the rotation matrix averaged over the next `future` positions.
    For a Gaussian query the expected unnormalised attention is the exponential of
        z[t] = s · k·Rμ + ½ · s² · k·(R Σ Rᵀ)k        k = K[t], s the softmax scaling
    score[h, t] = mean over the query heads of KV head h of softmax over t of z, times ‖V[h, t]‖₂: [kv_heads, tokens].

    covariance: with the second term. values: with the values' norms. sinks: the context's first tokens, always kept.
    """

    name: ClassVar[str] = "expected"
    source: ClassVar[str] = (
        "Expected Attention: KV Cache Compression by Estimating Attention (arXiv:2510.00636)"
    )

    future: int = 512
    sinks: int = 4
    covariance: bool = True
    values: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("future", "from 1 to 65536", 1 <= self.future <= 65536)
        self.require("sinks", "from 0 to 4096", 0 <= self.sinks <= 4096)

    def needs(self) -> Needs:
        return Needs(context_queries=None)

    def always(self, tokens: int, budget: int) -> range:
        return range(min(self.sinks, tokens))

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        keys, values = (
            held[:, self.sinks :] for held in evidence.attended(layer, evidence.cache.layers[layer])
        )
        mean, spread = self._queries(evidence, layer)
        kv_heads, _, d = keys.shape
        scaling = evidence.scaling(layer)
        # s·Rμ + ½·s²·k(R Σ Rᵀ), for the query heads of a KV head side by side; times k, that is z.
        inner = (scaling * mean).reshape(kv_heads, 1, -1)
        if self.covariance:
            beside = spread.unflatten(0, (kv_heads, -1)).transpose(1, 2).reshape(kv_heads, d, -1)
            inner = torch.baddbmm(inner, keys, beside, alpha=scaling**2 / 2)
        z = (inner.unflatten(2, (-1, d)) * keys[:, :, None]).sum(-1)
        attention = z.softmax(1).mean(2)
        if self.values:
            attention = attention * values.norm(dim=-1)
        heads = evidence.cache.layers[layer].kv_heads
        return torch.nn.functional.pad(attention.unflatten(0, (heads, -1)).mean(1), (self.sinks, 0))

    def _queries(self, evidence: Evidence, layer: int) -> tuple[Tensor, Tensor]:
        """Rμ [q_heads, d] and R Σ Rᵀ [q_heads, d, d]."""
        import torch

        queries, positions = evidence.context_queries, evidence.context_query_positions
        if not queries or positions is None or queries[layer].shape[1] < evidence.tokens:
            raise CodecError(f"{self.name} needs the queries of all {evidence.tokens} context tokens")
        if evidence.rotation is None:
            raise CodecError(f"{self.name} needs the model's rotary position embedding")
        rotation = evidence.rotation(layer)
        plain = rotation.undo(queries[layer][:, self.sinks :], positions[self.sinks :])
        next_positions = torch.arange(self.future, device=plain.device) + evidence.cache.length
        matrix = rotation.mean(next_positions)
        mean = plain.mean(1, keepdim=True)
        centred = plain.sub_(mean)
        spread = centred.transpose(1, 2) @ centred / plain.shape[1]
        return mean[:, 0] @ matrix.T, matrix @ spread @ matrix.T
