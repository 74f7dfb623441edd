"""What examples came to under each way of quantizing their caches; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from testbed.diagnosis.variants import Variants

Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Outcome:
    """One example under one setting. kl: of the gold answer's next-token distributions from the full cache's, nats a token; nll:
    of that answer, nats a token; score: the task's, 0 to 1.
    """

    kl: float
    nll: float
    score: float


class Outcomes(Generic[Way]):
    """Example by example what the full cache comes to, and each of these ways."""

    def __init__(self, ways: Mapping[Way, Callable[[Variants], Outcome]]) -> None:
        self._ways = ways
        self.full: list[Outcome] = []
        self.by_way: dict[Way, list[Outcome]] = {way: [] for way in ways}

    def __len__(self) -> int:
        """How many an example takes."""
        return len(self._ways)

    def add(self, variants: Variants) -> None:
        """One more example."""
        self.full.append(variants.full)
        for way, outcome in self._ways.items():
            self.by_way[way].append(outcome(variants))
