"""PyramidKV for any selector: more tokens in early layers, fewer in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.select.wrapper import Wrapper


@dataclass(frozen=True)
class PerLayer(Wrapper):
    """Budgets a layer: those of `pyramid`, falling on a line from the first layer to the last, by the scores of any selector."""

    name: ClassVar[str] = "perlayer"
    source: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression (arXiv:2406.02069)"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", "at least 1", self.beta >= 1)

    def budgets(self, tokens: int, budget: int, layers: int) -> list[int]:
        return falling(tokens, budget, layers, self.beta)


def falling(tokens: int, budget: int, layers: int, beta: float) -> list[int]:
    """Budgets on a line: with b tokens a layer on average, the last keeps b / beta and the first 2b - b / beta (at most all of
    them, and then the last keeps what is left). The sum is what equal budgets give.
    """
    if layers == 1:
        return [budget]
    first = min(2 * budget - budget / beta, tokens)
    fall = 2 * (first - budget) / (layers - 1)
    exact = [first - fall * layer for layer in range(layers)]
    whole = [int(each) for each in exact]
    for layer in range(budget * layers - sum(whole)):  # what rounding down left goes to the first layers
        whole[layer] += 1
    return [max(1, each) for each in whole]
