"""Reading recorded links: packet-delivery times and tables of rate, delay and loss over time.

Packet-delivery files are Mahimahi's (mm-link(1)): one whole number a line, milliseconds, not descending; at each time a packet of
1500 bytes can be delivered. Tables are comma-separated with a line of column names; ``#`` begins a line of comment::

    time_s,rate_mbps,delay_ms,loss_percent
    0,42.5,12,0
    1.5,38,14,0.1

Time is ``time_s``, ``time_ms`` or ``time_us``; rates are in ``_bps``, ``_kbps``, ``_mbps`` or ``_gbps`` (bits per second),
delays in ``_s``, ``_ms`` or ``_us``, losses fractions (``loss``) or ``loss_percent``. A name may say the way:
``rate_up_kbps``, ``rate_down_kbps``.
Logs of G-NetTrack are understood as they are: ``Timestamp``, ``DL_bitrate`` and ``UL_bitrate`` (kbit/s) out of many columns.

A value holds until the next row. Rows of the same time share the time up to the next one evenly; a value that is missing
(``-`` or nothing) is the one before; a gap is no outage: the last value holds over it. The last row lasts as long as the one
before it.
"""

from __future__ import annotations

import re
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError
from testbed.net.emulators.schedule import Milliseconds
from testbed.net.strict_yaml import did_you_mean

MAX_FILE_BYTES = 1 << 30
MAX_LINE = 4096
MAX_SECONDS = 7 * 86400.0
OPPORTUNITY_BYTES = 1500
_PLURAL = {"rate": "rates", "delay": "delays", "loss": "losses"}
_LIMITS = {"rate": 100e9 / 8, "delay": 60.0, "loss": 1.0}
_ALONE_S = 1.0  # how long the only row of a table lasts
_PEAK_MS = 100
_NANOSECOND = 1e-9
_CHUNK = 1 << 20

_TIME_UNITS: dict[str | None, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_COLUMN = re.compile(r"(rate|delay|loss)(?:_(up|down))?(?:_(bps|kbps|mbps|gbps|s|ms|us|percent))?$")
_UNITS: dict[str, Mapping[str | None, float]] = {
    "rate": {"bps": 1 / 8, "kbps": 1e3 / 8, "mbps": 1e6 / 8, "gbps": 1e9 / 8},
    "delay": _TIME_UNITS,
    "loss": {None: 1.0, "percent": 0.01},
}
_EXAMPLES = ["time_s", "time_ms", "rate_mbps", "rate_kbps", "rate_bps", "rate_up_mbps", "rate_down_mbps"]
_EXAMPLES += ["delay_ms", "delay_s", "loss", "loss_percent"]
_GNETTRACK = {"DL_bitrate": ("rate", "down", 1e3 / 8), "UL_bitrate": ("rate", "up", 1e3 / 8)}
_STAMP = re.compile(r"\d{4}\.\d\d\.\d\d_\d\d\.\d\d\.\d\d", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True, eq=False)
class Samples:
    """Values that hold from one time to the next: seconds, bytes per second, seconds, fractions; None: not in the file."""

    times: Sequence[float]
    length_s: float
    rates: array[float] | None = None
    delays: array[float] | None = None
    losses: array[float] | None = None

    def mean(self, column: str) -> float:
        """The time-weighted mean of ``rates``, ``delays`` or ``losses``."""
        values, ends = getattr(self, column), chain(islice(self.times, 1, None), (self.length_s,))
        return (
            sum(v * (end - at) for v, at, end in zip(values, self.times, ends, strict=True)) / self.length_s
        )

    @cached_property
    def mean_rate(self) -> float:
        """Bytes per second; 0 without rates."""
        return self.mean("rates") if self.rates is not None else 0.0

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


def read_recording(path: Path, way: str) -> Recording:
    """The recording in a file, for the way ``up`` or ``down``. Raises SpecError, with the line it dislikes.

    The last few are kept, until their file changes.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise SpecError(f"trace {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"trace {path}: not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise SpecError(f"trace {path}: larger than {MAX_FILE_BYTES >> 20} MiB")
    ways = _ways(path.absolute(), status.st_mtime_ns, status.st_size)
    if way not in ways:
        one = next(iter(ways.values()), None)
        if isinstance(one, DeliveryTimes):
            ways[way] = one  # such a file says nothing of ways
        else:
            ways[way] = _sharing(_read(path, way), one)
    return ways[way]


@lru_cache(maxsize=8)
def _ways(path: Path, changed_ns: int, size: int) -> dict[str, Recording]:
    """What has been read of a file, by the way."""
    return {}


def _sharing(new: Recording, other: Samples | None) -> Recording:
    """*new*, but what is the same for the other way is held once."""
    if other is None or not isinstance(new, Samples):
        return new
    same = {}
    for name in ("times", "rates", "delays", "losses"):
        mine, its = getattr(new, name), getattr(other, name)
        if mine is not None and its is not None and len(mine) == len(its) and _equal(mine, its):
            same[name] = its
    return replace(new, **same)


def _equal(one: Iterable[float], other: Iterable[float]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=True))


def _read(path: Path, way: str) -> Recording:
    try:
        with open(path, "rb") as file:
            first = file.readline(MAX_LINE + 1)
            file.seek(0)
            if first.strip().isdigit():
                return DeliveryTimes(_delivery_times(file, path))
            return _table(_lines(file, path), path, way)
    except OSError as error:
        raise SpecError(f"trace {path}: {error.strerror}") from None


def _wrong(path: Path, line: int, what: str) -> SpecError:
    return SpecError(f"trace {path}: line {line}: {what}")


def _delivery_times(file: BinaryIO, path: Path) -> array[int]:
    times: array[int] = array("I")
    rest, last = b"", 0
    while piece := file.read(_CHUNK):
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if len(rest) > MAX_LINE:
            raise _wrong(path, len(times) + 1, f"longer than {MAX_LINE} characters")
        if newline:
            last = _add_times(times, whole, last, path)
    if rest:
        _add_times(times, rest, last, path)
    if not times or times[-1] == 0:
        raise SpecError(f"trace {path}: no delivery after the time 0, so it has no length")
    return times


def _add_times(times: array[int], text: bytes, last: int, path: Path) -> int:
    """Appends whole lines' numbers; returns the last one. Fast where all is well, line by line where something is not."""
    text = text.replace(b"\r\n", b"\n").removesuffix(b"\r")
    if not text.translate(None, b"0123456789\n"):
        import numpy as np  # an hour is millions of lines: seven times as fast as int()

        found = np.fromstring(text, dtype=np.int64, sep="\n")
        complete = len(found) == text.count(b"\n") + 1
        if (
            complete
            and found[0] >= last
            and found[-1] <= MAX_SECONDS * 1e3
            and not (np.diff(found) < 0).any()
        ):
            times.frombytes(found.astype(np.uint32).tobytes())
            return int(found[-1])
    number = len(times)
    for line in text.split(b"\n"):
        number += 1
        shown = line[:40].decode(errors="replace")
        if not line.isdigit() or len(line) > 12:
            raise _wrong(path, number, f"{shown!r} is not a whole number of milliseconds")
        if int(line) < last:
            raise _wrong(path, number, f"{shown} comes before the line above, {last}")
        if int(line) > MAX_SECONDS * 1e3:
            raise _wrong(path, number, f"{shown} ms is more than {MAX_SECONDS / 86400:g} days")
        last = int(line)
    raise AssertionError("lines that were refused together are fine one by one")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without comments."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise _wrong(path, number, f"longer than {MAX_LINE} characters")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise _wrong(path, number, "not text (UTF-8)") from None
        if not text:
            raise _wrong(path, number, "empty")
        if not text.startswith("#"):
            yield number, [field.strip() for field in text.split(",")]


@dataclass(frozen=True)
class _Column:
    index: int
    name: str
    kind: str  # "rate", "delay" or "loss"
    factor: float


def _table(lines: Iterator[tuple[int, list[str]]], path: Path, way: str) -> Samples:
    number, names = next(lines, (1, []))
    if not names:
        raise SpecError(f"trace {path}: the file is empty")
    read_time, columns = _header(names, way, lambda what: _wrong(path, number, what))
    times, values = array("d"), [array("f") for _ in columns]
    before: list[float | None] = [None] * len(columns)
    started, group = None, 0  # rows since `group` have the same time
    for number, fields in lines:
        if len(fields) != len(names):
            raise _wrong(path, number, f"{len(fields)} fields, but {len(names)} columns")
        try:
            time = read_time(fields)
        except ValueError as error:
            raise _wrong(path, number, str(error)) from None
        started = time if started is None else started
        time -= started
        if times and time < times[group]:
            raise _wrong(path, number, "its time comes before that of the row above")
        if time > MAX_SECONDS:
            raise _wrong(path, number, f"more than {MAX_SECONDS / 86400:g} days after the first row")
        if times and time > times[group]:
            _spread(times, group, time)
            group = len(times)
        times.append(time)
        for i, column in enumerate(columns):
            before[i] = _value(column, fields[column.index], before[i], path, number)
            values[i].append(before[i])  # type: ignore[arg-type]
    if not times:
        raise SpecError(f"trace {path}: there is no row below the column names")
    length = times[group] + (times[group] - times[group - 1] if group else _ALONE_S)
    _spread(times, group, length)
    return Samples(
        _compact(times, length), length, **{_PLURAL[c.kind]: v for c, v in zip(columns, values, strict=True)}
    )


def _compact(times: array[float], length_s: float) -> Sequence[float]:
    """The same times as whole milliseconds, where they are to the nanosecond."""
    if round(times[-1] * 1000) / 1000 >= length_s:  # rows less than a nanosecond apart
        return times
    if any(abs(time - round(time * 1000) / 1000) > _NANOSECOND for time in times):
        return times
    return Milliseconds(array("I", (round(time * 1000) for time in times)))


def _spread(times: array[float], group: int, until: float) -> None:
    """Rows of one time share what there is up to the next one."""
    begin, rows = times[group], len(times) - group
    for i in range(1, rows):
        times[group + i] = begin + (until - begin) * i / rows


def _header(
    names: list[str], way: str, wrong: Callable[[str], SpecError]
) -> tuple[Callable[[list[str]], float], list[_Column]]:
    """How to read a row's time, and the columns that say something about this way."""
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise wrong(f"two columns are called {doubled[:40]!r}")
    if "Timestamp" in names and _GNETTRACK.keys() <= set(names):
        at = names.index("Timestamp")
        chosen = [
            _Column(names.index(name), name, kind, factor)
            for name, (kind, of, factor) in _GNETTRACK.items()
            if of == way
        ]
        return lambda fields: _stamp(fields[at]), chosen
    time: tuple[int, float] | None = None
    found: dict[str, dict[str | None, _Column]] = {"rate": {}, "delay": {}, "loss": {}}
    for index, name in enumerate(names):
        if name.startswith("time_") and name[5:] in _TIME_UNITS:
            if time is not None:
                raise wrong("two columns are times")
            time = index, _TIME_UNITS[name[5:]]
            continue
        match = _COLUMN.match(name)
        if match is None or match[3] not in _UNITS[match[1]]:
            raise wrong(f"unknown column {name[:40]!r}{did_you_mean(name[:40], _EXAMPLES)}")
        if match[2] in found[match[1]]:
            raise wrong(f"two columns give the {match[1]}")
        found[match[1]][match[2]] = _Column(index, name, match[1], _UNITS[match[1]][match[3]])
    if time is None:
        raise wrong("no column gives the time: time_s, time_ms or time_us")
    columns = [of[way] if way in of else of[None] for of in found.values() if way in of or None in of]
    if not columns:
        other = any(found.values())
        raise wrong(
            f"nothing is said of the way {way}; with column=up or column=down it can have the other's"
            if other
            else "no column gives a rate, a delay or a loss"
        )
    index, factor = time
    return lambda fields: _number(fields[index]) * factor, columns


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a number")
    return float(text)


def _stamp(text: str) -> float:
    if not _STAMP.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a time such as 2020.02.13_15.02.07")
    try:
        return (datetime.strptime(text, "%Y.%m.%d_%H.%M.%S") - datetime(2000, 1, 1)).total_seconds()
    except ValueError:
        raise ValueError(f"{text!r}: there is no such time") from None


def _value(column: _Column, text: str, before: float | None, path: Path, number: int) -> float:
    if text in ("", "-"):
        if before is None:
            raise _wrong(path, number, f"{column.name}: no value, and none before it")
        return before
    try:
        value = _number(text) * column.factor
    except ValueError as error:
        raise _wrong(path, number, f"{column.name}: {error}") from None
    if not 0 <= value <= _LIMITS[column.kind]:
        raise _wrong(path, number, f"{column.name}: {text[:40]} is out of bounds")
    return value
