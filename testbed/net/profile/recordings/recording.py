"""A recorded link in memory: values that hold for a while each, or the times at which packets could be delivered. And the lines
of the file that it comes from, with what is said of one that is wrong.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError

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
    loaded_delays: array[float] | None = None
    """Seconds, under load; `delays` are then those of a link that has next to nothing to do."""
    idle_rows: int = 0
    """Of its rows, those that were taken while nothing was transferred on purpose, and are there all the same."""

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


MAX_LINE = 4096
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def wrong(path: Path, line: int, what: str) -> SpecError:
    """The error that names the file and the line."""
    return SpecError(f"trace {path}: line {line}: {what}")


def says_nothing(line: bytes) -> bool:
    """Whether a line is blank, or a comment."""
    return not line.strip() or line.lstrip().startswith(b"#")


def first_line(file: BinaryIO, path: Path) -> bytes:
    """The first line that says something, stripped; empty where there is none. Raises SpecError."""
    for _, text in lines_that_say(file, path):
        return text.encode()
    return b""


def lines_that_say(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and stripped texts of the lines that are neither blank nor comments. Raises SpecError."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise wrong(path, number, f"longer than {MAX_LINE} characters")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if says_nothing(line):
            continue
        try:
            yield number, line.decode().strip()
        except UnicodeDecodeError:
            raise wrong(path, number, "not text (UTF-8)") from None


def comma_separated(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without comments and blank lines. Raises SpecError."""
    for number, text in lines_that_say(file, path):
        yield number, [field.strip() for field in text.split(",")]
