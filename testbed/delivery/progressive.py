"""Bit plane by bit plane: the answer is given from the first ones, and verified when the others are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import Part, Pipelined

MOST_PLANES = 8  #: that a codec has


@dataclass(frozen=True)
class Progressive(Pipelined):
    """What a codec's bit planes are read with, then the planes, the most significant first: a chunk each. Where a link may lose
    some, the answer is given from those before the first that is lost.
    """

    name: ClassVar[str] = "progressive"
    source: ClassVar[str] = (
        "Lynx, arXiv 2607.01831: most significant bits first, verified as the others arrive"
    )

    depends_on_times: ClassVar[bool] = True

    planes: int = 1  #: so many are answered from

    def __post_init__(self) -> None:
        self.require("planes", f"from 1 to {MOST_PLANES}", 1 <= self.planes <= MOST_PLANES)

    def parts(self, tokens: int, layers: int) -> list[Part]:
        return [Part("tokens", 0, tokens)]

    def unfit(self, codec: str) -> str:
        has = parse_codec(codec).quantizer.planes
        if has >= self.planes:
            return ""
        why = f"has {has}" if has else "has none"
        remedy = f"at most progressive(planes={has})" if has else "planes, planes+zstd or another delivery"
        return f"{self} answers from the first {self.planes} of a codec's bit planes, and {codec} {why}: take {remedy}"
