"""What a serving discipline is: who is next at the cloud, how many are decoded at a time, and who is turned away.

Adding one is a file with a class, and a line in `SERVINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from testbed import kinds
from testbed.kinds import Size
from testbed.serving.job import Job

#: By the name that scenarios and rows have.
SERVINGS = {
    "fifo": "testbed.serving.fifo:Fifo",
    "shortest": "testbed.serving.shortest:Shortest",
    "batch": "testbed.serving.batch:Batch",
}


@dataclass(frozen=True)
class Serving(kinds.Kind, ABC):
    """Base of all disciplines. A request is turned away where there is no room for it among those that wait, or in memory, which
    it takes from when all of it is there until it is answered.
    """

    together: ClassVar[int] = 1  #: requests that are decoded at a time

    waiting: int = 0  #: most requests that wait; 0: any number
    memory: Size = 0  #: bytes for rebuilt caches, waiting requests' included; 0: any number

    def __post_init__(self) -> None:
        self.require("waiting", "0 to 1000000", 0 <= self.waiting <= 1_000_000)
        self.require("memory", "at least 0b", self.memory >= 0)

    @property
    def most(self) -> int:
        """Requests that are decoded at a time."""
        return self.together

    @abstractmethod
    def next(self, waiting: Sequence[Job]) -> Job:
        """Whose turn it is, of those that wait, in the order in which they came."""


def parse(text: str) -> Serving:
    """The discipline that is written so. Raises SpecError."""
    serving: Serving = kinds.parse(text, SERVINGS, "serving")
    return serving
