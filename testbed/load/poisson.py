"""Requests that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed.kinds import PerSecond
from testbed.load.load import MOST, Arrival, Open, random_of, too_many


@dataclass(frozen=True)
class Poisson(Open):
    """A Poisson process over all edges, each of which is as likely to be asked next."""

    name: ClassVar[str] = "poisson"
    source: ClassVar[str] = "Kleinrock, Queueing Systems 1, 1975"

    rate: PerSecond  #: of all edges together

    def __post_init__(self) -> None:
        self.require("rate", "more than 0/s and at most 100000/s", 0 < self.rate <= 1e5)

    def arrivals(self, edges: Sequence[str], until_s: float, seed: str) -> list[Arrival]:
        if self.rate * until_s > MOST:
            raise too_many(self.rate * until_s, str(self))
        numbers, found, at = random_of(f"poisson/{seed}"), list[Arrival](), 0.0
        while (at := at + numbers.expovariate(self.rate)) < until_s:
            found.append(Arrival(at, numbers.randrange(len(edges))))
        return found
