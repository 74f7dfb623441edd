"""PyramidKV: more tokens in early layers, fewer in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.select.perlayer import falling
from testbed.codecs.select.snapkv import SnapKV


@dataclass(frozen=True)
class Pyramid(SnapKV):
    """Pyramidal budgets: SnapKV's scores, with layer budgets that fall from the first layer to the last.

    With b tokens a layer on average, the last keeps b / beta and the first 2b - b / beta (at most all of them, and then the
    last keeps what is left); those between lie on a line. The sum is what equal budgets give.
    """

    name: ClassVar[str] = "pyramid"
    source: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression (arXiv:2406.02069)"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", "at least 1", self.beta >= 1)

    def budgets(self, tokens: int, budget: int, layers: int) -> list[int]:
        return falling(tokens, budget, layers, self.beta)
