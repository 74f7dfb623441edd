"""Mixed precision: most keys and values coarse, those that a diagnosis found fragile finer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.codecs import diagnosed
from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.quantize.integer import INTEGERS, Integer
from testbed.codecs.steps import Grid, Part, Quantizer

#: Whose scales the coarse integers have: each group of 32 elements (and a zero point), the same without zero points, or each
#: token and KV head.
Scale = Literal["group", "symmetric", "token"]
SCALES: tuple[Scale, ...] = ("group", "symmetric", "token")

if TYPE_CHECKING:
    from torch import Tensor


def coarse(bits: int, scale: str) -> Integer:
    """The integers of what is not protected."""
    if scale == "token":
        return INTEGERS[bits](group=0, symmetric=True)
    return INTEGERS[bits](symmetric=True) if scale == "symmetric" else INTEGERS[bits]()


@dataclass(frozen=True)
class Mixed(Quantizer):
    """Integers of `low` bits everywhere but in the protected layers, which get `high` bits (16: as they are).

    protect: which layers' keys and values: ``K3.V7.12`` (keys of 3, values of 7, both of 12), ``K0-5``, ``none``; a file that
    `testbed diagnose` wrote; or ``auto``, the model's own diagnosis. A payload names the layers, whatever was asked for.
    scale: the coarse integers have scales and zero points for groups of 32 elements (``group``), the scales alone
    (``symmetric``), or one scale for each token and KV head (``token``), as int8 has: smaller each time. Which of them loses
    least is a model's own. The finer ones are `Integer` with its defaults for that width; the error bounds are its.

    As published it is ``mixed(high=16, scale=token)``.
    """

    name: ClassVar[str] = "mixed"
    source: ClassVar[str] = (
        "Task-Aware KV-Cache Compression for Bandwidth-Efficient Collaborative LLM Inference; "
        "KVTuner (arXiv:2502.04420) for layer-wise widths"
    )

    low: int = 4
    high: int = 8
    protect: str = "auto"
    scale: Scale = "group"

    def __post_init__(self) -> None:
        self.require("low", "2, 3, 4 or 8", self.low in INTEGERS)
        self.require(
            "high", "3, 4, 8 or 16, and more than low", self.high in (3, 4, 8, 16) and self.high > self.low
        )
        if not diagnosed.is_reference(self.protect):
            diagnosed.read_places(self.protect)

    @property
    def refers(self) -> bool:
        return diagnosed.is_reference(self.protect)

    def bound(self, model: str | None) -> Mixed:
        if not self.refers:
            return self
        return replace(self, protect=diagnosed.look_up(self.protect, model, self.low, self.scale))

    @cached_property
    def _places(self) -> frozenset[diagnosed.Place]:
        return diagnosed.read_places(self.protect)

    def _method(self, part: Part) -> Quantizer:
        if (part.kind, part.layer) not in self._places:
            return coarse(self.low, self.scale)
        return FP16() if self.high == 16 else INTEGERS[self.high]()

    def uniform(self, part: Part) -> Grid | None:
        return self._method(part).uniform(part)

    def symbol_bits(self, part: Part) -> int:
        return self._method(part).symbol_bits(part)

    def side_bytes(self, part: Part) -> int:
        return self._method(part).side_bytes(part)

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._method(part).encode(part, values)

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        return self._method(part).decode(part, symbols, side)
