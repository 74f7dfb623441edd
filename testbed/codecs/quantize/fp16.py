"""The reference: 16-bit values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from testbed.codecs.steps import Part, Quantizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FP16(Quantizer):
    """The cache's own 16-bit values (fp16 or bf16), bit for bit; NaN and infinity included."""

    name: ClassVar[str] = "fp16"
    source: ClassVar[str] = "reference"

    @property
    def by_token(self) -> bool:
        return True

    def symbol_bits(self, part: Part) -> int:
        return 16

    def encode(self, part: Part, values: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        return values.to(getattr(torch, part.dtype)).contiguous().view(torch.int16), None

    def decode(self, part: Part, symbols: Tensor, side: Tensor) -> Tensor:
        import torch

        return symbols.view(getattr(torch, part.dtype)).view(part.shape)
