"""CAKE's layer budgets for any selector: more tokens where attention is spread out and moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.evidence import Needs
from testbed.codecs.select.wrapper import Wrapper

if TYPE_CHECKING:
    from testbed.codecs.evidence import Evidence


@dataclass(frozen=True)
class Cake(Wrapper):
    """Budgets a layer by its preference: how far attention spreads, and how much it shifts from token to token.

    Of the attention A of the last `observers` context tokens to those before them, all heads together:
        P[layer] = H^(1/spread) · V^(1/shift),  H = -Σ A ln A,  V = Σ over tokens t of the variance over observers of A[q, t]
    A layer keeps its share P / ΣP of all budgets, at most all tokens, by the scores of the selector `by`. Published with a
    cascade that evicts while layers are prefilled, and with scores of its own.
    """

    name: ClassVar[str] = "cake"
    source: ClassVar[str] = (
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences (arXiv:2503.12491)"
    )

    observers: int = 32
    spread: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("observers", "from 2 to 65536", 2 <= self.observers <= 65536)
        self.require("spread", "above 0 and at most 1000", 0 < self.spread <= 1000)
        self.require("shift", "above 0 and at most 1000", 0 < self.shift <= 1000)

    def needs(self) -> Needs:
        return Needs.of_all([super().needs(), Needs(context_queries=self.observers)])

    def preference(self, evidence: Evidence, layer: int) -> float:
        """A layer's P."""
        import torch

        paid = evidence.attention_before(layer, self.observers)
        dispersion = float(-torch.xlogy(paid, paid).sum())
        shifting = float(paid.var(1).sum()) if paid.numel() and paid.shape[1] > 1 else 0.0
        return float(dispersion ** (1 / self.spread) * shifting ** (1 / self.shift))

    def allot(self, evidence: Evidence, budget: int) -> list[int]:
        wanted = [self.preference(evidence, layer) for layer in evidence.prunable]
        return shared_out(wanted, budget * len(wanted), evidence.tokens)


def shared_out(wanted: list[float], total: int, most: int) -> list[int]:
    """Whole numbers from 1 to `most` that add up to `total`, in proportion to what is wanted as far as those bounds allow."""
    shares = [0] * len(wanted)
    left, rest = set(range(len(wanted))), total
    while left:
        whole = sum(wanted[i] for i in left) or 1.0
        exact = {i: rest * wanted[i] / whole for i in left}
        beyond = {i for i in left if exact[i] >= most}
        if not beyond:
            break
        for i in beyond:
            shares[i] = most
        left, rest = left - beyond, rest - most * len(beyond)
    for i in left:
        shares[i] = max(1, int(exact[i]))
    order = sorted(left, key=lambda i: shares[i] - exact[i])  # who lost the most by rounding down comes first
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        for i in order if step > 0 else order[::-1]:
            if sum(shares) != total and 1 <= shares[i] + step <= most:
                shares[i] += step
    return shares
