"""CacheGen's adaptation: the link goes on as it was during the last chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.policies.policy import Policy, Situation
from testbed.delivery.policies.prediction import Link, best_level, observed_rates, telling_levels, until_told


@dataclass(frozen=True)
class Throughput(Policy):
    """The best level at which all that remains would still meet the deadline, at the rate of the last chunk that arrived.

    `prediction.best_level` with one level for all remaining chunks. Until a rate is known, the middle one of the levels that
    will tell it (`prediction.until_told`).
    """

    name: ClassVar[str] = "throughput"
    source: ClassVar[str] = "Liu et al., CacheGen, SIGCOMM 2024, section 5.3 and algorithm 1"

    def choose(self, situation: Situation) -> int:
        rates = observed_rates(situation)
        if not rates:
            telling = telling_levels(situation)
            return until_told(situation, telling[(len(telling) - 1) // 2])
        return best_level(situation, Link([(0.0, rates[-1])]), 0)
