"""How far a run is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from testbed.experiment.estimate import Estimator
from testbed.experiment.scenario import Cell, Plan

#: The first trials say little about the pace.
_SETTLING_S = 5.0


@dataclass
class Progress:
    """What a watcher is told after each step."""

    done: int
    total: int
    remaining_s: float | None
    text: str


Watcher = Callable[[Progress], None]


class Tally:
    """Counts trials and weighs each by what it was expected to take, so that the forecast knows slow links from fast ones."""

    def __init__(self, plan: Plan, watch: Watcher, trials: int | None = None) -> None:
        self._watch, self._estimator = watch, Estimator(plan)
        self._planned = plan.trials if trials is None else trials
        self._trials = 0
        self._done_s = self._total_s = 0.0  #: by the estimate
        self._started: float | None = None

    def expect(self, cell: Cell, trials: int) -> None:
        """So many trials of this cell are ahead."""
        self._total_s += trials * self._estimator.seconds(cell)

    def skip(self, cell: Cell) -> None:
        """A trial of this cell has its row already."""
        self._trials += 1
        self._total_s -= self._estimator.seconds(cell)

    def begin(self) -> None:
        """Trials begin now."""
        self._started = time.monotonic()

    def done(self, cell: Cell) -> None:
        """A trial of this cell has ended."""
        self._trials += 1
        self._done_s += self._estimator.seconds(cell)
        self._tell(
            f"{cell.profile.name}  {cell.codec_text or f'{cell.placement} placement'}", self._remaining()
        )

    def say(self, text: str) -> None:
        """What is going on besides trials."""
        self._tell(text, None)

    def _remaining(self) -> float | None:
        spent = time.monotonic() - self._started if self._started is not None else 0.0
        if not self._done_s or spent < _SETTLING_S:
            return None
        return max(0.0, self._total_s - self._done_s) * spent / self._done_s

    def _tell(self, text: str, remaining_s: float | None) -> None:
        self._watch(Progress(self._trials, self._planned, remaining_s, text))
