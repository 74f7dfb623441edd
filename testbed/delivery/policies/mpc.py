"""Robust model predictive control, as video players do it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import harmonic_mean
from typing import ClassVar

from testbed.delivery.policies.policy import Policy, Situation
from testbed.delivery.policies.prediction import Link, best_level, observed_rates, telling_levels, until_told

_LAST = 5  # rates of which the mean is taken, and errors that are remembered


@dataclass(frozen=True)
class MPC(Policy):
    """The best levels for the next `horizon` chunks, each its own, and one for all behind them, at a cautious rate.

    The rate is the harmonic mean of the last five chunks', divided by 1 + the greatest of the last five relative errors
    |mean - rate| / rate that this mean made. `prediction.best_level` compares all plans; the first step of the best is taken.
    Until there is a rate, the smallest level that will tell it (`prediction.until_told`).
    """

    name: ClassVar[str] = "mpc"
    source: ClassVar[str] = (
        "Yin et al., A Control-Theoretic Approach for Dynamic Adaptive Video Streaming, SIGCOMM 2015"
    )

    horizon: int = 5

    def __post_init__(self) -> None:
        self.require("horizon", "from 1 to 20 chunks", 1 <= self.horizon <= 20)

    def choose(self, situation: Situation) -> int:
        rates = observed_rates(situation)
        if not rates:
            return until_told(situation, telling_levels(situation)[-1])
        return best_level(situation, Link([(0.0, cautious(rates))]), self.horizon)


def cautious(rates: list[float]) -> float:
    """Bits per second that can be counted on after these."""
    errors = [
        abs(_mean(rates[:i]) - rates[i]) / rates[i] for i in range(max(1, len(rates) - _LAST), len(rates))
    ]
    return _mean(rates) / (1 + max(errors, default=0.0))


def _mean(rates: list[float]) -> float:
    return harmonic_mean(rates[-_LAST:])
