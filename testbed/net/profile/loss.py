"""Loss that comes in bursts: which packets a direction loses, as a Markov chain that steps once a packet, and what that comes to
in the long run: how long bursts are, and how much the number of losses varies.

Independent loss needs none of this (`Direction.loss` alone). A chain may be given by its transition
probabilities or by what one measures: the mean loss and the mean length of a burst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from testbed.errors import SpecError
from testbed.units import exact_percentage, format_fraction

if TYPE_CHECKING:
    import numpy as np

_NOTHING = 1e-9  # what rounding leaves of zero


@dataclass(frozen=True)
class Chain:
    """A loss model as a Markov chain: from each state the chances of the next, and each state's loss. Begins in state 0."""

    steps: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]

    def reached(self) -> Chain:
        """Without the states that are never visited."""
        states = [0]
        for state in states:
            states += [other for other, p in enumerate(self.steps[state]) if p and other not in states]
        steps = tuple(tuple(self.steps[i][j] for j in states) for i in states)
        return Chain(steps, tuple(self.losses[i] for i in states))

    @property
    def burst(self) -> float | None:
        """Mean number of packets lost in a row, in the long run; None where it never ends or never begins."""
        import numpy as np  # takes a while to import

        losses = np.array(self.losses)
        lost = self._visits() * losses
        once, twice = float(lost.sum()), float(lost @ np.array(self.steps) @ losses)
        return once / (once - twice) if once - twice > _NOTHING * once else None

    @property
    def spread(self) -> float:
        """How much more the number of lost packets varies, in variance, than if each were lost on its own; at least for many."""
        import numpy as np

        visits, losses = self._visits(), np.array(self.losses)
        mean = float(visits @ losses)
        if not 0 < mean < 1:
            return 1.0
        # What packets k apart have in common, summed over all k: with P's fundamental matrix (Kemeny and Snell 1960).
        steps, n = np.array(self.steps), len(losses)
        fundamental = np.linalg.inv(np.eye(n) - steps + np.outer(np.ones(n), visits))
        common = (visits * losses) @ (steps @ fundamental) @ (losses - mean)
        return max(0.0, 1 + 2 * float(common) / (mean * (1 - mean)))

    def _visits(self) -> np.ndarray:
        import numpy as np

        # The share of packets in each state: what a step does not change, and sums up to one.
        n = len(self.losses)
        balance = np.vstack([np.array(self.steps).T - np.eye(n), np.ones(n)])
        return np.linalg.lstsq(balance, np.array([0.0] * n + [1.0]), rcond=None)[0]


_LEAST = 1e-9  # the kernel's probabilities come in steps of 2.3e-10


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also false for NaN
        raise SpecError(f"loss: {name} {format_fraction(value)} lies outside 0%..100%")
    if 0 < value < _LEAST:
        raise SpecError(f"loss: {name} {value:g} is too small to ever matter; give 0 or {_LEAST:g} at least")


class GilbertElliott(msgspec.Struct, frozen=True, tag="gilbert"):
    """A good and a bad state. Per packet: it is lost with the state's probability, then the state may change.

    `p` is the probability to go from good to bad, `r` from bad to good; `bad_loss` (1-h) and `good_loss` (1-k)
    are the states' loss. Starts in the good state. With the defaults, bursts are runs of the bad state, of
    mean length 1/r, and the mean loss is p/(p+r): Gilbert 1960; Elliott 1963; tc-netem(8), ``gemodel``.
    """

    p: float
    r: float
    bad_loss: float = 1.0
    good_loss: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("p", self.p), ("r", self.r), ("1-h", self.bad_loss), ("1-k", self.good_loss)):
            _probability(name, value)
        if self.p + self.r == 0:
            raise SpecError("loss: p and r are both 0: the state would never change")

    @classmethod
    def bursty(cls, mean: float, burst: float) -> GilbertElliott:
        """The chain that loses the fraction `mean`, in bursts of `burst` packets on average. Raises SpecError."""
        _probability("mean", mean)
        if mean == 1 or not 1 <= burst <= 1e6:
            raise SpecError(f"loss: a mean below 100% and a mean burst of 1..1000000 packets, not {burst:g}")
        p = mean / burst / (1 - mean)
        if p > 1:
            least = mean / (1 - mean)
            raise SpecError(
                f"loss: bursts of {burst:g} cannot make up {format_fraction(mean)}; give {least:.3g} at least"
            )
        return cls(p, 1 / burst)

    @classmethod
    def correlated(cls, mean: float, correlation: float) -> GilbertElliott:
        """The chain that loses `mean`, where one packet's fate has this correlation with the next one's.

        The two-state chain with that autocorrelation, so the mean is what was asked. (tc-netem(8)'s own
        ``loss random P CORRELATION`` loses far less than P.)
        """
        _probability("mean", mean)
        if mean in (0, 1) or not 0 <= correlation < 1:
            raise SpecError("loss: correlated needs a mean between 0% and 100% and a correlation below 100%")
        return cls(mean * (1 - correlation), (1 - mean) * (1 - correlation))

    @property
    def mean(self) -> float:
        """The fraction lost in the long run."""
        bad = self.p / (self.p + self.r)
        return bad * self.bad_loss + (1 - bad) * self.good_loss

    def chain(self) -> Chain:
        """Its states as packets meet them: the loss is drawn before the step."""
        return Chain(((1 - self.p, self.p), (self.r, 1 - self.r)), (self.good_loss, self.bad_loss)).reached()

    def __str__(self) -> str:
        for mean in (self.mean, float(f"{self.mean:.12g}")):
            for burst in (
                0.0 if self.r == 0 else 1 / self.r,
                0.0 if self.r == 0 else float(f"{1 / self.r:.12g}"),
            ):
                if 0 < mean < 1 and burst >= 1 and mean <= burst * (1 - mean) and burst <= 1e6:
                    try:
                        same = GilbertElliott.bursty(mean, burst) == self
                    except SpecError:  # by a rounding error
                        same = False
                    if same:
                        number = f"{burst:g}" if float(f"{burst:g}") == burst else repr(burst)
                        return f"gilbert({exact_percentage(mean)},burst={number})"
        parts = [f"p={exact_percentage(self.p)}", f"r={exact_percentage(self.r)}"]
        parts += [f"1-h={exact_percentage(self.bad_loss)}"] if self.bad_loss != 1 else []
        parts += [f"1-k={exact_percentage(self.good_loss)}"] if self.good_loss else []
        return f"gilbert({','.join(parts)})"


class FourState(msgspec.Struct, frozen=True, tag="states"):
    """States 1 (received in a gap), 2 (received in a burst), 3 (lost in a burst), 4 (lost alone, in a gap).

    `pIJ` is the probability to go from state I to J, once a packet; a packet is lost that arrives in state 3
    or 4; 4 always returns to 1. Starts in 1. Salsano et al., 'Definition of a general and intuitive loss model
    for packet networks and its implementation in the Netem module', 2010; tc-netem(8), ``loss state``.
    """

    p13: float
    p31: float
    p32: float = 0.0
    p23: float = 1.0
    p14: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p13", "p31", "p32", "p23", "p14"):
            _probability(name, getattr(self, name))
        for first, second in (("p13", "p14"), ("p31", "p32")):
            if getattr(self, first) + getattr(self, second) > 1:
                raise SpecError(f"loss: {first} and {second} together exceed 100%")
        if self.p32 and not self.p23:
            raise SpecError("loss: with p32 and without p23 nothing is lost any more from state 2 on")

    @property
    def mean(self) -> float:
        """The fraction lost in the long run."""
        if self.p13 == 0:
            return self.p14 / (1 + self.p14)
        if self.p31 == 0:
            second = self.p32 / self.p23 if self.p32 else 0.0
            return 1 / (1 + second)
        # In units of state 1: balance of the cuts {1,4} | {2,3}, 2 | rest, 4 | rest.
        third = self.p13 / self.p31
        second = third * self.p32 / self.p23 if self.p32 else 0.0
        return (third + self.p14) / (1 + second + third + self.p14)

    def chain(self) -> Chain:
        """Its states as packets meet them: the step is taken before."""
        one = (1 - self.p13 - self.p14, 0.0, self.p13, self.p14)
        two, three = (0.0, 1 - self.p23, self.p23, 0.0), (self.p31, self.p32, 1 - self.p31 - self.p32, 0.0)
        return Chain((one, two, three, (1.0, 0.0, 0.0, 0.0)), (0.0, 0.0, 1.0, 1.0)).reached()

    def __str__(self) -> str:
        parts = [f"p13={exact_percentage(self.p13)}", f"p31={exact_percentage(self.p31)}"]
        parts += [f"p32={exact_percentage(self.p32)}"] if self.p32 else []
        parts += [f"p23={exact_percentage(self.p23)}"] if self.p23 != 1 else []
        parts += [f"p14={exact_percentage(self.p14)}"] if self.p14 else []
        return f"states({','.join(parts)})"


# Tagged, so that a record of a network says which of them it was.
LossModel = GilbertElliott | FourState
