"""Laws of jitter: how far a packet's delay deviates, in units of the jitter written beside it.

Every law is a table of quantiles, the same for both emulators (netem takes nothing else): a deviation is a table
entry drawn at random. tc-netem(8), ``distribution``; the tables of its ``/usr/lib/tc/*.dist`` can be used, too.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from testbed import lookup
from testbed.errors import SpecError
from testbed.files import read_at_most

TABLE_SIZE, TABLE_SCALE = 4096, 8192
"""Entries of a table, and the entry that stands for one jitter. Entries are 16-bit: four jitters at most."""
_MAX_FILE, _MAX_ENTRIES = 1_000_000, 16_384
_FORBIDDEN = set(",;()= \t\r\n\0\"'")
LAWS = ("normal", "pareto", "paretonormal", "uniform")
"""`normal`: of standard deviation one jitter. `pareto`: shape 3, mean zero, the same deviation: rarely early,
sometimes very late. `paretonormal`: a quarter normal, three quarters Pareto. `uniform`: evenly within one jitter
either way."""


@dataclass(frozen=True)
class JitterTable:
    """A law out of a file: numbers between blanks, 8192 standing for one jitter; ``#`` begins a comment.

    Make one with `read_table`. *at*: where the file is, as was found beside the one that names it (`testbed.lookup`).
    """

    path: str
    entries: tuple[int, ...] = field(repr=False)
    at: str = field(default="", repr=False, compare=False)

    def found(self) -> Path:
        """Where the file is."""
        return Path(self.at or self.path)


def read_table(path: str) -> JitterTable:
    """The table in a file. Raises SpecError naming the file, and the line, for what is none."""
    if not path or len(path) > 300 or _FORBIDDEN & set(path):
        raise SpecError(f"jitter table {path[:40]!r}: no file name of that kind is understood here")
    entries, at = list[int](), lookup.find(path)
    for number, line in enumerate(_text(path, at or path).split("\n"), 1):
        for word in line.partition("#")[0].split():
            try:
                value = int(word)
            except ValueError:
                raise SpecError(f"jitter table {path}, line {number}: {word[:20]!r} is no integer") from None
            if not -32768 <= value <= 32767:
                raise SpecError(f"jitter table {path}, line {number}: {value} lies outside -32768..32767")
            entries.append(value)
    if not 1 <= len(entries) <= _MAX_ENTRIES:
        raise SpecError(f"jitter table {path}: {len(entries)} entries; 1 to {_MAX_ENTRIES} are understood")
    return JitterTable(path, tuple(entries), at)


def _text(path: str, at: str) -> str:
    try:
        return read_at_most(at, _MAX_FILE).decode("ascii", "replace")
    except OSError as error:
        raise SpecError(f"jitter table {path}: {error.strerror}") from None


def table(law: str | JitterTable) -> tuple[int, ...]:
    """The law's quantiles, ascending where the law is one of `LAWS`."""
    return law.entries if isinstance(law, JitterTable) else _table(law)


@dataclass(frozen=True)
class Spread:
    """What delays look like under a law of jitter. Seconds."""

    delays: tuple[float, ...]  # ascending, equally likely
    median_s: float
    deviation_s: float  # standard
    kurtosis: float  # fourth central moment over the squared second; 0 where nothing deviates


def spread(law: str | JitterTable, jitter_s: float, delay_s: float) -> Spread:
    """The delays of packets far enough apart to keep their order by themselves, none below zero."""
    delays = sorted(max(0.0, delay_s + entry * jitter_s / TABLE_SCALE) for entry in table(law))
    n = len(delays)
    mean = sum(delays) / n
    second, fourth = (sum((delay - mean) ** power for delay in delays) / n for power in (2, 4))
    kurtosis = fourth / second**2 if second else 0.0
    return Spread(tuple(delays), (delays[(n - 1) // 2] + delays[n // 2]) / 2, math.sqrt(second), kurtosis)


@functools.cache
def _table(law: str) -> tuple[int, ...]:
    from statistics import NormalDist  # takes a while to import

    ranks = [(i + 0.5) / TABLE_SIZE for i in range(TABLE_SIZE)]
    if law == "normal":
        values = [NormalDist().inv_cdf(rank) for rank in ranks]
    elif law == "uniform":
        return tuple(round((2 * rank - 1) * TABLE_SCALE) for rank in ranks)
    elif law == "pareto":
        values = _standard([_pareto(rank) for rank in ranks])
    elif law == "paretonormal":
        values = _standard(_mixed(ranks, NormalDist().inv_cdf))
    else:
        raise SpecError(f"unknown jitter law {law!r}")
    return tuple(max(-32768, min(32767, round(value * TABLE_SCALE))) for value in values)


def _pareto(rank: float) -> float:
    # Mean 3/2, variance 3/4.
    return ((1 - rank) ** (-1 / 3) - 1.5) / math.sqrt(0.75)


def _mixed(ranks: list[float], normal_quantile: Callable[[float], float]) -> list[float]:
    # The quantiles of a sum: those of all sums of two coarse tables.
    coarse = [(i + 0.5) / 256 for i in range(256)]
    normal = [0.25 * normal_quantile(rank) for rank in coarse]
    pareto = [0.75 * _pareto(rank) for rank in coarse]
    sums = sorted(a + b for a in normal for b in pareto)
    return [sums[int(rank * len(sums))] for rank in ranks]


def _standard(values: list[float]) -> list[float]:
    """Mean 0 and deviation 1 within the four deviations that an entry can hold."""
    for _ in range(20):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        values = [(value - mean) / deviation for value in values]
        values[bisect_right(values, 4.0) :] = [4.0] * (len(values) - bisect_right(values, 4.0))
    return values
