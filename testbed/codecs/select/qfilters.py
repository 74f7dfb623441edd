"""Q-Filters: keys along the direction that a head's queries have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from testbed import lookup
from testbed.codecs import CodecError
from testbed.codecs.evidence import Needs
from testbed.codecs.kept import is_name
from testbed.codecs.select import Selector, filters

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class QFilters(Selector):
    """Query filters: keeps the tokens whose keys lie along the main direction of the head's queries.

    u[g] = first right singular vector of query head g's queries, as attention uses them, with the sign by which they lie along
    it on average. score[h, t] = K[h, t] · u[h], u[h] the mean of u[g] over the query heads of KV head h: [kv_heads, tokens].

    filters: a file of directions that were fitted on other texts (``python -m testbed.diagnosis.filters``), or the hash that
    names them: the paper's form, which looks at no query. own: fitted on the context's queries, where none were fitted before.
    """

    name: ClassVar[str] = "qfilters"
    source: ClassVar[str] = (
        "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression (arXiv:2503.02812)"
    )

    filters: str = "own"

    @property
    def refers(self) -> bool:
        return self.filters != "own" and not is_name(self.filters)

    def bound(self, model: str | None) -> QFilters:
        if not self.refers:
            return self
        path = Path(lookup.find(self.filters) or self.filters).expanduser()
        return replace(self, filters=filters.KEPT.save(filters.KEPT.load(path)[1])[0])

    def needs(self) -> Needs:
        return Needs(context_queries=None) if self.filters == "own" else Needs()

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        held = evidence.cache.layers[layer]
        keys, _ = evidence.attended(layer, held)
        if self.filters == "own":
            queries = evidence.context_queries
            if not queries or queries[layer].shape[1] < evidence.tokens:
                raise CodecError(f"{self.name} needs the queries of all {evidence.tokens} context tokens")
            direction = main_direction(gram(queries[layer]), queries[layer].double().sum(1), len(keys))
        else:
            fitted = filters.KEPT.known(self.filters).direction(layer)
            if fitted is None or fitted.shape != (len(keys), keys.shape[2]):
                raise CodecError(
                    f"{self.name}: the filters {self.filters} are of another model's layer {layer}"
                )
            direction = fitted
        along = (keys * direction.to(keys.device)[:, None]).sum(-1)
        return along.unflatten(0, (held.kv_heads, -1)).mean(1)


def gram(queries: Tensor) -> Tensor:
    """QᵀQ of each head, float64 [q_heads, d, d]: those of several texts add up."""
    wide = queries.double()
    return wide.transpose(1, 2) @ wide


def main_direction(grams: Tensor, sums: Tensor, kv_heads: int) -> Tensor:
    """u of each KV head, float32 [kv_heads, d], of its query heads' QᵀQ [q_heads, d, d] and sums of queries [q_heads, d]."""
    import torch

    first = torch.linalg.eigh(grams).eigenvectors[..., -1]  # of QᵀQ: Q's first right singular vector
    sign = torch.where((first * sums).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (first * sign).unflatten(0, (kv_heads, -1)).mean(1).float()
