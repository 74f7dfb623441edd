"""What a delivery is: which chunks of a context cross a link and when, and what the far side makes of them.

Adding one is a file with a class, and a line in `DELIVERIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from testbed import kinds

#: By the name that scenarios and rows have.
DELIVERIES = {
    "whole": "testbed.delivery.whole:Whole",
}

#: What a text crosses by, and a cache where nobody says otherwise.
WHOLE = "whole"

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Delivery(kinds.Kind, ABC):
    """Base of all deliveries."""

    @abstractmethod
    def send(self, pieces: Iterable[Bytes]) -> Iterable[Bytes]:
        """At the edge: of the pieces as a codec makes them, the chunks that are to cross. Each is sent before the next is asked
        for; a list of them, which are all there, is handed over at once.
        """

    @abstractmethod
    def receive(self, chunks: Iterable[Bytes]) -> Iterable[Bytes]:
        """At the cloud: of the chunks as they come, the codec's bytes in their order, cut anywhere."""


def parse(text: str) -> Delivery:
    """The delivery that is written so. Raises SpecError."""
    delivery: Delivery = kinds.parse(text, DELIVERIES, "delivery")
    return delivery
