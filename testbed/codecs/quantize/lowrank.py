"""Low rank: of each head's keys and values the coordinates along few principal components are sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from testbed.codecs.quantize.projected import CHANNELWISE, Projected, channelwise
from testbed.codecs.steps import Quantizer


@dataclass(frozen=True)
class LowRank(Projected):
    """Principal components: z = V(x − μ), V the share `keep` of the components, those of the largest variance; x̂ = Vᵀẑ + μ.

    Keys are projected before RoPE, as Palu caches them. Palu takes V from the weights, whitened by calibration inputs, which is
    the same but for μ, and gives layers ranks by Fisher information; here all layers have the same share.

    basis: a file of components fitted on other texts (``python -m testbed.diagnosis.basis``), or the hash that names them: both
    sides must have it. own: fitted on the context, and sent with it. of: what codes z. See `Projected`.
    """

    name: ClassVar[str] = "lowrank"
    source: ClassVar[str] = "Palu: Compressing KV-Cache with Low-Rank Projection (arXiv:2407.21118)"

    keep: float = 0.5
    of: str = "int4"

    def __post_init__(self) -> None:
        self.require("keep", "from 0.125 to 1", 0.125 <= self.keep <= 1)
        self.require("of", f"one of {', '.join(CHANNELWISE)}", self.of in CHANNELWISE)

    @cached_property
    def inner(self) -> Quantizer:
        return channelwise(self.of)

    def rank(self, width: int) -> int:
        return max(1, round(self.keep * width))
