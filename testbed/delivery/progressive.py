"""Bit plane by bit plane: the answer begins from the first ones, while the others are still to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.delivery import Bytes, Delivery


@dataclass(frozen=True)
class Progressive(Delivery):
    """The pieces of an embedded codec one by one: what they are read with, then the planes, the most significant first."""

    name: ClassVar[str] = "progressive"
    source: ClassVar[str] = (
        "Lynx, arXiv 2607.01831: most significant bits first, verified as the others arrive"
    )

    planes: int = 1  #: so many are answered from

    def __post_init__(self) -> None:
        self.require("planes", "from 1 to 8", 1 <= self.planes <= 8)

    def send(self, pieces: Iterable[Bytes]) -> Iterator[Bytes]:
        return iter(pieces)
