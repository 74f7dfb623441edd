"""Whether this machine computes steadily, and for both sides alike: measured before the trials, between them and after them.

Each side prefills the same fixed text, in turn, on the path that its requests take. What is judged: the share of the time in
which a side wanted to compute that it was given a processor; how much longer the prefill takes than before the trials; and, of
sides that compute on the same thing, how much longer one takes than the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from testbed.endpoints.protocol import Computed
from testbed.errors import EndpointError
from testbed.experiment.trial import utc_now

SIDES = ("edge", "cloud")
#: What rows are warned of: more than this, or less than its inverse, of the time before the trials, or of the other side's.
WARNED = 1.25
#: What the run is stopped for: that much unlike sides.
GROSS = 2.0
#: The same of the share of a processor.
WARNED_SHARE, GROSS_SHARE = 0.8, 0.5
_ROUNDS_BEFORE, _ROUNDS_BETWEEN = 5, 3
#: Between trials, at most this part of a run's time goes into measuring, and it is never done more often than every ten seconds.
_PART, _OFTEN_S = 0.03, 10.0


class Sides(Protocol):
    """What is needed of a `Pair`."""

    def compute(self, side: str) -> Computed: ...


@dataclass(frozen=True)
class Side:
    """One side's repetitions. Seconds of a prefill; `share` of a processor, None where it is unknown."""

    median_s: float
    least_s: float
    most_s: float
    share: float | None


@dataclass(frozen=True)
class Measured:
    """Both sides at about the same time, and the machine then (proc_loadavg(5), proc_pressure(5), proc_stat(5))."""

    measured_at: str
    tokens: int
    edge: Side
    cloud: Side
    load: float | None  #: processes that run or wait to, over the last minute
    pressure: float | None  #: part of the last ten seconds in which some process waited for a processor
    steal: float | None  #: part of the processors' time that other virtual machines took meanwhile

    @property
    def ratio(self) -> float:
        """The edge's time over the cloud's."""
        return self.edge.median_s / self.cloud.median_s

    def complaints(
        self, before: Measured | None, alike: bool, share: float = WARNED_SHARE, times: float = WARNED
    ) -> list[str]:
        """What is out of tolerance, in words. before: what drift is told by; alike: both sides compute on the same thing."""
        said = []
        for side, own in zip(SIDES, (self.edge, self.cloud), strict=True):
            if own.share is not None and own.share < share:
                said.append(f"the {side} had a processor for {own.share:.0%} of the time it wanted one")
            drift = own.median_s / getattr(before, side).median_s if before is not None else 1.0
            if not 1 / times <= drift <= times:
                said.append(f"the {side} takes {drift:.2f} times as long as before the trials")
        if alike and not 1 / times <= self.ratio <= times:
            said.append(f"the edge takes {self.ratio:.2f} times as long as the cloud")
        return said

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio}


def measure(sides: Sides, rounds: int) -> Measured:
    """So many repetitions on each side, one side after the other, so that what disturbs one disturbs both."""
    busy, stolen = _ticks()
    computed: dict[str, list[Computed]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            computed[side].append(sides.compute(side))
    after, stolen_after = _ticks()
    steal = (stolen_after - stolen) / (after - busy) if after > busy else None
    edge, cloud = (_side(computed[side]) for side in SIDES)
    return Measured(utc_now(), computed["edge"][0].tokens, edge, cloud, _load(), _pressure(), steal)


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

    write: given the record after every measurement.
    """

    def __init__(self, sides: Sides, alike: bool, write: Callable[[dict[str, Any]], None]) -> None:
        self._sides, self._alike, self._write = sides, alike, write
        self._made: list[dict[str, Any]] = []
        self._before: Measured | None = None
        self._ended = self._cost_s = 0.0
        self.complaints: list[str] = []

    def open(self, accept: bool) -> None:
        """Measure before the trials, and once more where that is far out. Raises EndpointError where it still is, unless told to
        accept it."""
        measure(self._sides, 1)  # the first one pays for what no other does
        for attempt in (1, 2):
            measured = self._measure(_ROUNDS_BEFORE)
            gross = measured.complaints(None, self._alike, GROSS_SHARE, GROSS)
            if not gross:
                break
            if attempt == 2 and not accept:
                raise EndpointError(
                    f"this machine does not compute as trials need it: {'; '.join(gross)} "
                    f"(load {measured.load}); wait until it has nothing else to do, or continue all the same with "
                    "--accept-uncalibrated"
                )
        self._before = measured
        self.complaints = measured.complaints(None, self._alike)

    def between(self) -> None:
        """Measure between trials, where the last time is long enough ago."""
        if time.monotonic() - self._ended >= max(_OFTEN_S, self._cost_s / _PART):
            self.close()

    def close(self) -> None:
        """Measure now."""
        self.complaints = self._measure(_ROUNDS_BETWEEN).complaints(self._before, self._alike)

    def _measure(self, rounds: int) -> Measured:
        started = time.monotonic()
        measured = measure(self._sides, rounds)
        self._ended = time.monotonic()
        self._cost_s = self._ended - started
        said = measured.complaints(self._before, self._alike)
        self._made.append({**measured.record(), "complaints": said})
        self._write({"alike": self._alike, "tolerance": WARNED, "measurements": self._made})
        return measured
