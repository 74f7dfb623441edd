"""Whether this machine computes steadily, and for both sides alike: measured before the trials, between them and after them.

Each side prefills the same fixed text, in turn, on the path that its requests take. What is judged: the share of the time in
which a side wanted to compute that it was given a processor; how much longer the prefill takes than before the trials; and, of
sides that compute on the same thing, how much longer one takes than the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Protocol

from testbed.endpoints.protocol import Computed
from testbed.errors import EndpointError
from testbed.experiment.compute import SIDES, Measurement, Side, Start
from testbed.experiment.results import utc_now

#: What the run is stopped for: that much unlike sides, and so small a share of a processor.
GROSS, GROSS_SHARE = 2.0, 0.5
_ROUNDS_BEFORE, _ROUNDS_BETWEEN = 5, 3
#: Between trials, at most this part of a run's time goes into measuring, and it is never done more often than every ten seconds.
_PART, _OFTEN_S = 0.03, 10.0


class Sides(Protocol):
    """What is needed of a `Pair`."""

    def compute(self, side: str) -> Computed: ...


def measure(sides: Sides, rounds: int) -> Measurement:
    """So many repetitions on each side, one side after the other, so that what disturbs one disturbs both."""
    ticks, stolen = _ticks()
    computed: dict[str, list[Computed]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            computed[side].append(sides.compute(side))
    ticks_after, stolen_after = _ticks()
    steal = (stolen_after - stolen) / (ticks_after - ticks) if ticks_after > ticks else None
    edge, cloud = (_side(computed[side]) for side in SIDES)
    return Measurement(utc_now(), computed["edge"][0].tokens, edge, cloud, _load(), _pressure(), steal)


def _side(computed: list[Computed]) -> Side:
    seconds = [each.seconds for each in computed]
    shares = [each.share for each in computed if each.share is not None]
    return Side(median(seconds), min(seconds), max(seconds), median(shares) if shares else None)


def _load() -> float | None:
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _pressure() -> float | None:
    try:  # "some avg10=0.12 …"
        return float(Path("/proc/pressure/cpu").read_text().split()[1].removeprefix("avg10=")) / 100
    except (OSError, ValueError, IndexError):  # a kernel without these figures
        return None


def _ticks() -> tuple[int, int]:
    """All of the processors' time so far, and what of it was stolen, in clock ticks; zeros where it is unknown."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return 0, 0
    return sum(ticks), ticks[7] if len(ticks) > 7 else 0


class Gate:
    """One start of a run's. `complaints`: what its last measurement was out of tolerance in, for the rows behind it.

    write: given the start so far after every measurement.
    """

    def __init__(self, sides: Sides, alike: bool, write: Callable[[Start], None]) -> None:
        self._sides, self._alike, self._write = sides, alike, write
        self._measurements: tuple[Measurement, ...] = ()
        self._before: Measurement | None = None
        self._ended = self._cost_s = 0.0

    @property
    def complaints(self) -> tuple[str, ...]:
        return self._measurements[-1].complaints if self._measurements else ()

    def open(self, accept: bool) -> None:
        """Measure before the trials, and once more where that is far out. Raises EndpointError where it still is, unless told to
        accept it."""
        measure(self._sides, 1)  # the first one pays for what no other does
        for attempt in (1, 2):
            measurement = self._measure(_ROUNDS_BEFORE)
            gross = measurement.judged(None, self._alike, GROSS_SHARE, GROSS)
            if not gross:
                break
            if attempt == 2 and not accept:
                raise EndpointError(
                    f"this machine does not compute as trials need it: {'; '.join(gross)} "
                    f"(load {measurement.load}); wait until it has nothing else to do, or continue all the same with "
                    "--accept-uncalibrated"
                )
        self._before = measurement

    def between(self) -> None:
        """Measure between trials, where the last time is long enough ago."""
        if time.monotonic() - self._ended >= max(_OFTEN_S, self._cost_s / _PART):
            self.close()

    def close(self) -> None:
        """Measure now."""
        self._measure(_ROUNDS_BETWEEN)

    def _measure(self, rounds: int) -> Measurement:
        started = time.monotonic()
        measurement = measure(self._sides, rounds)
        self._ended = time.monotonic()
        self._cost_s = self._ended - started
        measurement = replace(measurement, complaints=measurement.judged(self._before, self._alike))
        self._measurements = (*self._measurements, measurement)
        self._write(Start(self._alike, self._measurements))
        return measurement
