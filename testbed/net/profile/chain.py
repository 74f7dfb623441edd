"""What a loss model's Markov chain comes to in the long run: how long bursts are, and how much the number of losses varies."""

from __future__ import annotations

from dataclasses import dataclass

_NOTHING = 1e-9  # what rounding leaves of zero


@dataclass(frozen=True)
class Chain:
    """A loss model as a Markov chain: from each state the chances of the next, and each state's loss. Begins in state 0."""

    steps: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]

    def reached(self) -> Chain:
        """Without the states that are never visited."""
        found = [0]
        for state in found:
            found += [other for other, p in enumerate(self.steps[state]) if p and other not in found]
        steps = tuple(tuple(self.steps[i][j] for j in found) for i in found)
        return Chain(steps, tuple(self.losses[i] for i in found))

    @property
    def burst(self) -> float | None:
        """Mean number of packets lost in a row, in the long run; None where it never ends or never begins."""
        lost = sum(p * loss for p, loss in zip(self._visits(), self.losses, strict=True))
        again = self._together(1)
        return lost / (lost - again) if lost - again > _NOTHING * lost else None

    @property
    def spread(self) -> float:
        """How much more the number of lost packets varies, in variance, than if each were lost on its own; at least for many."""
        import numpy as np  # takes a while to import

        visits, losses = np.array(self._visits()), np.array(self.losses)
        mean = float(visits @ losses)
        if not 0 < mean < 1:
            return 1.0
        # What packets k apart have in common, summed over all k: with P's fundamental matrix (Kemeny and Snell 1960).
        steps, n = np.array(self.steps), len(losses)
        fundamental = np.linalg.inv(np.eye(n) - steps + np.outer(np.ones(n), visits))
        common = (visits * losses) @ (steps @ fundamental) @ (losses - mean)
        return max(0.0, 1 + 2 * float(common) / (mean * (1 - mean)))

    def _together(self, apart: int) -> float:
        # The probability that a packet and the one so many behind it are both lost.
        now = [p * loss for p, loss in zip(self._visits(), self.losses, strict=True)]
        for _ in range(apart):
            now = [sum(p * row[i] for p, row in zip(now, self.steps, strict=True)) for i in range(len(now))]
        return sum(p * loss for p, loss in zip(now, self.losses, strict=True))

    def _visits(self) -> tuple[float, ...]:
        import numpy as np

        # The share of packets in each state: what a step does not change, and sums up to one.
        n = len(self.losses)
        balance = np.vstack([np.array(self.steps).T - np.eye(n), np.ones(n)])
        return tuple(float(x) for x in np.linalg.lstsq(balance, np.array([0.0] * n + [1.0]), rcond=None)[0])
