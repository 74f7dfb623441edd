"""CriticalKV: any selector's scores, weighed by what each token would add to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs import CodecError
from testbed.codecs.select import rankable
from testbed.codecs.select.wrapper import Wrapper

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Critical(Wrapper):
    """Output perturbation: a share `first` of the budget by the selector `by`, the rest by its scores times projected values.

    With b tokens to keep and s[h, t] by's scores, the round(first · b) highest s come first, and then the highest
        (s[h, t] + ε) · mean over the query heads g of KV head h of ‖W_O[g] · V[h, t]‖₁                [kv_heads, tokens]
    W_O[g] being the columns of the layer's output projection that head g's values go through, ε = 1e-4. by's scores are shares
    of attention in the paper; ones below 0 are refused.
    """

    name: ClassVar[str] = "critical"
    source: ClassVar[str] = (
        "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective (arXiv:2502.03805)"
    )

    first: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("first", "from 0 to 1", 0 <= self.first <= 1)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        plain = rankable(super().scores(evidence, layer))
        if plain.numel() and float(plain.min()) < 0:
            raise CodecError(f"{self.name} weighs shares of attention, and {self.by} gives scores below 0")
        budget = max(1, round(self.ratio * evidence.tokens))
        first = plain.sort(dim=1, descending=True, stable=True).indices[:, : round(self.first * budget)]
        weighed = (plain + 1e-4) * self._projected(evidence, layer).cpu()
        return weighed.scatter_(1, first, torch.inf)

    def _projected(self, evidence: Evidence, layer: int) -> Tensor:
        """How much each token's value is in the layer's output, float32 [kv_heads, tokens]."""
        import torch

        if evidence.projection is None:
            raise CodecError(f"{self.name} needs the model's output projections, and they are not at hand")
        held = evidence.cache.layers[layer]
        _, values = evidence.attended(layer, held)
        # [hidden, query heads, value_dim] -> one query head after the other, to hold one's outputs at a time
        heads = evidence.projection(layer).unflatten(1, (-1, values.shape[2])).unbind(1)
        group = len(heads) // len(values)
        norms = [(values[i // group] @ own.T).abs().sum(-1) for i, own in enumerate(heads)]
        return torch.stack(norms).unflatten(0, (held.kv_heads, -1)).mean(1)
