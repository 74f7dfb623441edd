"""How steadily a machine computed, as compute.json has it: each start of a run, its measurements and what they complained of."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

SIDES = ("edge", "cloud")
#: What rows are warned of: more than this, or less than its inverse, of the time before the trials, or of the other side's.
WARNED = 1.25
#: The same of the share of a processor.
WARNED_SHARE = 0.8

_Seconds = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class Side:
    """One side's repetitions. Seconds of a prefill; `share` of a processor, None where it is unknown."""

    median_s: _Seconds
    least_s: _Seconds
    most_s: _Seconds
    share: float | None


@dataclass(frozen=True)
class Measurement:
    """Both sides at about the same time, and the machine then (proc_loadavg(5), proc_pressure(5), proc_stat(5))."""

    measured_at: str
    tokens: int
    edge: Side
    cloud: Side
    load: float | None  #: processes that run or wait to, over the last minute
    pressure: float | None  #: part of the last ten seconds in which some process waited for a processor
    steal: float | None  #: part of the processors' time that other virtual machines took meanwhile
    complaints: tuple[str, ...] = ()  #: as it was judged then

    @property
    def ratio(self) -> float:
        """The edge's time over the cloud's."""
        return self.edge.median_s / self.cloud.median_s

    def judged(
        self, before: Measurement | None, alike: bool, share: float = WARNED_SHARE, times: float = WARNED
    ) -> tuple[str, ...]:
        """What is out of tolerance, in words. before: what drift is told by; alike: both sides compute on the same thing."""
        complaints = []
        for side, own in zip(SIDES, (self.edge, self.cloud), strict=True):
            if own.share is not None and own.share < share:
                complaints.append(f"the {side} had a processor for {own.share:.0%} of the time it wanted one")
            drift = own.median_s / getattr(before, side).median_s if before is not None else 1.0
            if not 1 / times <= drift <= times:
                complaints.append(f"the {side} takes {drift:.2f} times as long as before the trials")
        if alike and not 1 / times <= self.ratio <= times:
            complaints.append(f"the edge takes {self.ratio:.2f} times as long as the cloud")
        return tuple(complaints)


@dataclass(frozen=True)
class Start:
    """One start of a run: its measurements in order; `alike`: both sides compute on the same thing, and are compared.

    host: where; empty: unknown. judged: its rows know already what was measured behind them, as those of shards do, which are
    made at the same time.
    """

    alike: bool
    measurements: Annotated[tuple[Measurement, ...], msgspec.Meta(min_length=1)]
    host: str = ""
    judged: bool = False

    @functools.cached_property
    def times(self) -> list[str]:
        """When each of them ended."""
        return [measurement.measured_at for measurement in self.measurements]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        measurements = [{**msgspec.to_builtins(m), "ratio": m.ratio} for m in self.measurements]
        about = {"alike": self.alike, "host": self.host, "tolerance": WARNED}
        return {**about, "measurements": measurements}


def starts(record: Sequence[Any]) -> tuple[Start, ...]:
    """The starts of compute.json, in their order; what is none is passed over."""
    read = []
    for entry in record:
        try:
            read.append(msgspec.convert(entry, Start))
        except msgspec.ValidationError:
            continue
    return tuple(read)


def complaints_behind(known: Sequence[Start], moment: str) -> tuple[str, ...]:
    """What the first measurement behind a moment complained of, in the start that was on then; nothing where none came."""
    for start in known:
        if start.judged:
            continue
        place = bisect_right(start.times, moment)
        if 0 < place < len(start.times):
            return start.measurements[place].complaints
    return ()
