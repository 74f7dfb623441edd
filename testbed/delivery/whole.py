"""Everything is encoded, then sent, and decoded when all of it is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.delivery import Bytes, Delivery


@dataclass(frozen=True)
class Whole(Delivery):
    """All at once, as the codec made it."""

    name: ClassVar[str] = "whole"
    source: ClassVar[str] = "a payload in one transfer, which every bytes-over-rate figure means"

    def send(self, pieces: Iterable[Bytes]) -> list[Bytes]:
        return list(pieces)

    def receive(self, chunks: Iterable[Bytes]) -> list[Bytes]:
        return list(chunks)
