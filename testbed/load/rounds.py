"""Rounds in which all edges ask at the same moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.kinds import Time
from testbed.load.load import MOST, Arrival, Open, too_many


@dataclass(frozen=True)
class Rounds(Open):
    """Every so often all edges ask at once, as agents do that work on one task in turns."""

    name: ClassVar[str] = "rounds"
    source: ClassVar[str] = "agents of one cell that all have a cache to send by the same deadline"

    every: Time  #: between the beginnings of two rounds

    def __post_init__(self) -> None:
        self.require("every", "from 1ms to an hour", 1e-3 <= self.every <= 3600)

    def arrivals(self, edges: Sequence[str], until_s: float, seed: str) -> list[Arrival]:
        """In each round one at each edge, in their order."""
        rounds = math.ceil(until_s / self.every - 1e-9)
        if rounds * len(edges) > MOST:
            raise too_many(rounds * len(edges), str(self))
        return [Arrival(turn * self.every, edge) for turn in range(rounds) for edge in range(len(edges))]
