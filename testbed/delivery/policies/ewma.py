"""A smoothed rate, and a part of it held back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.delivery.policies.policy import Policy, Situation
from testbed.delivery.policies.prediction import Link, best_level, observed_rates, telling_levels, until_told


@dataclass(frozen=True)
class EWMA(Policy):
    """The best level at which all that remains would meet the deadline, at `safety` times the rates' moving average.

    e = alpha · rate + (1 - alpha) · e over the chunks that arrived, beginning with the first one's rate. Until there is one,
    the smallest level that will tell it (`prediction.until_told`).
    """

    name: ClassVar[str] = "ewma"
    source: ClassVar[str] = (
        "Cheng and Liao: the mode by an EWMA of the bandwidth, times 0.8, under a deadline"
    )

    alpha: float = 0.5  #: the weight of the newest rate
    safety: float = 0.8  #: the part of the average that is counted on

    def __post_init__(self) -> None:
        self.require("alpha", "above 0 and at most 1", 0 < self.alpha <= 1)
        self.require("safety", "above 0 and at most 1", 0 < self.safety <= 1)

    def choose(self, situation: Situation) -> int:
        rates = observed_rates(situation)
        if not rates:
            return until_told(situation, telling_levels(situation)[-1])
        average = rates[0]
        for rate in rates[1:]:
            average = self.alpha * rate + (1 - self.alpha) * average
        return best_level(situation, Link([(0.0, self.safety * average)]), 0)
