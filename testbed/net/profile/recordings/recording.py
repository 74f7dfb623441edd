"""A recorded link in memory: values that hold for a while each, or the times at which packets could be delivered."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise

MAX_SECONDS = 7 * 86400.0
OPPORTUNITY_BYTES = 1500
_PEAK_MS = 100


@dataclass(frozen=True, eq=False)
class Samples:
    """Values that hold from one time to the next: seconds, bytes per second, seconds, fractions; None: not in the file."""

    times: Sequence[float]
    length_s: float
    rates: array[float] | None = None
    delays: array[float] | None = None
    losses: array[float] | None = None

    def mean(self, column: str, begin_s: float = 0.0) -> float:
        """The time-weighted mean of ``rates``, ``delays`` or ``losses``, from *begin_s* to the end; behind it, the last value."""
        values, ends = getattr(self, column), chain(islice(self.times, 1, None), (self.length_s,))
        if begin_s >= self.length_s:
            return values[-1]
        spans = (max(0.0, end - max(at, begin_s)) for at, end in zip(self.times, ends, strict=True))
        return sum(v * span for v, span in zip(values, spans, strict=True) if span) / (
            self.length_s - begin_s
        )

    @cached_property
    def peak_rate(self) -> float:
        """The largest rate, bytes per second; 0 without rates."""
        return max(self.rates) if self.rates is not None else 0.0


@dataclass(frozen=True, eq=False)
class DeliveryTimes:
    """Milliseconds, not descending, at each of which 1500 bytes can be delivered; the last one ends the trace."""

    times_ms: array[int]

    @property
    def length_s(self) -> float:
        return self.times_ms[-1] / 1e3

    @property
    def mean_rate(self) -> float:
        """Bytes per second."""
        return len(self.times_ms) * OPPORTUNITY_BYTES / self.length_s

    @cached_property
    def peak_rate(self) -> float:
        """Bytes per second in the busiest tenth of a second."""
        ends = range(_PEAK_MS, self.times_ms[-1] + 2 * _PEAK_MS, _PEAK_MS)
        counts = [0, *(bisect_left(self.times_ms, end) for end in ends)]
        most = max(after - before for before, after in pairwise(counts))
        return most * OPPORTUNITY_BYTES * 1000 / min(_PEAK_MS, self.times_ms[-1])


Recording = Samples | DeliveryTimes
