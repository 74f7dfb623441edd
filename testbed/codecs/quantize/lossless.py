"""16-bit values without loss, in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from testbed.codecs.entropy.exponents import Exponents
from testbed.codecs.quantize.fp16 import FP16
from testbed.codecs.steps import Coder


@dataclass(frozen=True)
class Lossless(FP16):
    """The cache's own 16-bit values, bit for bit (NaN, infinity and denormals, too); exponents are entropy-coded.

    Exponents of a layer's keys (or values) are few, and take about as many bits as their frequencies say; signs and mantissas,
    which hardly compress, stay as they are. A part that does not shrink travels as it is. coder: of the exponents; ans takes
    fewer bytes of bfloat16 than zstd, and many times as long.
    """

    name: ClassVar[str] = "lossless"
    source: ClassVar[str] = "DFloat11 (arXiv:2504.11651); ZipNN (arXiv:2411.05239)"

    coder: Literal["zstd", "ans"] = "zstd"

    @property
    def own_coder(self) -> Coder | None:
        return Exponents(self.coder)
