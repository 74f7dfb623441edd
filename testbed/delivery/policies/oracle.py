"""Who knows what the link will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.policies.policy import Policy, Situation
from testbed.delivery.policies.prediction import Link, best_level

_EACH = 32  # or fewer, where that would take too long (see `best_level`)


@dataclass(frozen=True)
class Oracle(Policy):
    """The best levels for all remaining chunks, each its own, on a link whose rate over time is known: the bound.

    Exact where the link does what its rate says; on a real one, which has also headers, slow starts and losses, it may be beaten.
    Of more than 32 chunks those behind the first 32 are planned at one level for all, or behind fewer where levels are many,
    as there would be no time for more.
    """

    name: ClassVar[str] = "oracle"
    source: ClassVar[str] = "a bound of our own: an exact dynamic programme over levels"
    foresees: ClassVar[bool] = True

    def choose(self, situation: Situation) -> int:
        if situation.rate is None:
            raise ValueError("the oracle has not been told the link's rate")
        return best_level(situation, Link(situation.rate), _EACH)
