"""Leverage scores: keys that the others do not span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs import CodecError
from testbed.codecs.select import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence

RIDGE = (
    1e-2  #: added to the diagonal, so that contexts of fewer tokens than a key has elements are ranked, too
)


@dataclass(frozen=True)
class Leverage(Selector):
    """Statistical leverage: keeps the tokens whose keys lie least in the directions that the context's keys have in common.

    With X [tokens, d] a head's keys before their rotary embedding, less their mean over the context,
        score[h, t] = x_t · (XᵀX + 0.01·I)⁻¹ · x_t                                              [kv_heads, tokens]
    Exact, in float64, where the paper multiplies X with a random matrix of 48 columns first. Looks at no query.
    """

    name: ClassVar[str] = "leverage"
    source: ClassVar[str] = (
        "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores (arXiv:2507.08143)"
    )

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        return leverage(evidence, layer, slice(None))


def leverage(evidence: Evidence, layer: int, tokens: slice) -> Tensor:
    """The leverage of these context tokens' keys among themselves: float32 [kv_heads, n].

    Where a latent is cached, it is that of the keys that attention makes of it, averaged. Raises CodecError where the rotary
    embedding is not known.
    """
    import torch

    if evidence.rotation is None:
        raise CodecError("leverage scores need the model's rotary position embedding")
    held = evidence.cache.layers[layer]
    keys, _ = evidence.attended(layer, held)
    x = evidence.rotation(layer).undo(keys, held.positions)[:, tokens].double()
    x = x - x.mean(1, keepdim=True)
    gram = x.transpose(1, 2) @ x
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    scores = (x * torch.linalg.solve(gram, x.transpose(1, 2)).transpose(1, 2)).sum(-1)
    return scores.float().unflatten(0, (held.kv_heads, -1)).mean(1)
