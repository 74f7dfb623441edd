"""What a load is: which client asks when, in an open loop (whatever becomes of earlier requests) or a closed one.

Adding one is a file with a class, and a line in `LOADS`. The same seed gives the same arrivals.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from testbed import kinds
from testbed.errors import SpecError

#: By the name that scenarios and rows have.
LOADS = {
    "sequential": "testbed.load.sequential:Sequential",
    "closed": "testbed.load.closed:Closed",
    "poisson": "testbed.load.poisson:Poisson",
    "rounds": "testbed.load.rounds:Rounds",
    "arrivals": "testbed.load.arrivals:Arrivals",
}

#: Requests of an episode that are planned beforehand.
MOST = 200_000
_FILE = "arrivals:"


class Arrival(NamedTuple):
    """A request comes up at an edge, by its number, so many seconds behind the episode's start."""

    at: float
    edge: int


class Client(NamedTuple):
    """Of a closed loop: at which edge, by its number, and when it asks first."""

    edge: int
    at: float


@dataclass(frozen=True)
class Load(kinds.Kind, ABC):
    """Base of all loads."""

    timed: ClassVar[bool] = True  #: it lasts for a time, in which requests may meet each other

    def bound(self) -> Load:
        """The load with its file where it is. Raises SpecError."""
        return self

    @property
    def identity(self) -> str:
        """What tells it from others: its text, or what its file says."""
        return str(self)


@dataclass(frozen=True)
class Open(Load):
    """Base of those that ask on, however long answers take."""

    @abstractmethod
    def arrivals(self, edges: Sequence[str], until_s: float, seed: str) -> list[Arrival]:
        """When requests come up at which of these edges, in order, up to that time. Raises SpecError: there are too many."""


def random_of(seed: str) -> random.Random:
    """Numbers that a text decides."""
    return random.Random(seed)


def parse(text: str) -> Load:
    """The load that is written so. Raises SpecError."""
    if len(text) <= kinds.LONGEST and text.startswith(_FILE):
        from testbed.load.arrivals import Arrivals

        return Arrivals(text.removeprefix(_FILE).strip())
    load: Load = kinds.parse(text, LOADS, "load")
    return load


def too_many(count: float, what: str) -> SpecError:
    """Says that these are more than an episode has."""
    return SpecError(f"{what}: about {count:,.0f} requests; an episode has at most {MOST:,}")
