"""Tables of rate, delay and loss over time: comma-separated, under a line of column names (see `recordings`)."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError
from testbed.net.profile.deliveries import Milliseconds
from testbed.net.profile.recordings.recording import (
    MAX_SECONDS,
    Samples,
    comma_separated,
    lines_that_say,
    wrong,
)
from testbed.strict_yaml import did_you_mean

_PLURAL = {"rate": "rates", "delay": "delays", "loss": "losses", "loaded_delay": "loaded_delays"}
_LIMITS = {"rate": 100e9 / 8, "delay": 60.0, "loss": 1.0, "loaded_delay": 60.0}
_ALONE_S = 1.0  # how long the only row of a table lasts
_NANOSECOND = 1e-9

_TIME_UNITS: dict[str | None, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_COLUMN = re.compile(
    r"(rate|delay|loss|loaded_delay)(?:_(up|down))?(?:_(bps|kbps|mbps|gbps|s|ms|us|fraction|percent))?$"
)
_UNITS: dict[str, Mapping[str | None, float]] = {
    "rate": {"bps": 1 / 8, "kbps": 1e3 / 8, "mbps": 1e6 / 8, "gbps": 1e9 / 8},
    "delay": _TIME_UNITS,
    "loaded_delay": _TIME_UNITS,
    "loss": {"fraction": 1.0, "percent": 0.01},
}
_EXAMPLES = ["time_s", "time_ms", "rate_mbps", "rate_kbps", "rate_bps", "rate_up_mbps", "rate_down_mbps"]
_EXAMPLES += ["delay_ms", "delay_s", "loss_fraction", "loss_percent", "loaded_delay_ms"]
_GNETTRACK = {"DL_bitrate": ("rate", "down", 1e3 / 8), "UL_bitrate": ("rate", "up", 1e3 / 8)}
_STAMP = re.compile(r"\d{4}\.\d\d\.\d\d_\d\d\.\d\d\.\d\d", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Column:
    """One of a row's fields: what it is called, whether it is a rate, a delay or a loss, and by what it is in our units."""

    index: int
    name: str
    kind: str  # "rate", "delay", "loss" or "loaded_delay"
    factor: float


def meaning(name: str) -> tuple[str, str | None, float] | None:
    """What a column of that name is: its kind, its way (None: both), and its unit in ours; None where it says no such thing."""
    match = _COLUMN.fullmatch(name)
    if match is None or match[3] not in _UNITS[match[1]]:
        return None
    return match[1], match[2], _UNITS[match[1]][match[3]]


def headless(first: bytes) -> bool:
    """Whether a file with this first line has no column names: two numbers, seconds and Mbit/s, as Pensieve's traces."""
    fields = first.decode(errors="replace").split()
    return len(fields) == 2 and all(_NUMBER.fullmatch(field) for field in fields)


def read_headless_table(file: BinaryIO, path: Path) -> Samples:
    """The same as `read_table` of a file that is `headless`."""
    rows = ((number, text.split()) for number, text in lines_that_say(file, path))
    rate = Column(1, "the rate", "rate", _UNITS["rate"]["mbps"])
    return samples(rows, 2, lambda fields: to_number(fields[0]), [rate], path)


def read_table(file: BinaryIO, path: Path, way: str, skip_idle: bool = False) -> Samples:
    """What the table in an open file says of a way; *path*: what it is called. *skip_idle*: without the time in which a phone
    transferred nothing of its own accord (see `idle_in`). Raises SpecError, with the line it dislikes."""
    lines = comma_separated(file, path)
    number, names = next(lines, (1, []))
    if not names:
        raise SpecError(f"trace {path}: the file is empty")
    read_time, columns = _header(names, way, lambda what: wrong(path, number, what))
    is_idle = idle_in(names)
    if skip_idle and is_idle is None:
        raise wrong(path, number, "skip=idle: of logs of G-NetTrack, whose State says so; this is none")
    return samples(lines, len(names), read_time, columns, path, is_idle, skip_idle)


def idle_in(names: list[str]) -> Callable[[list[str]], bool] | None:
    """Of a log of G-NetTrack, whether a row was taken while the phone was idle (its State has no D, for data) or pinged; None of
    another table."""
    if "Timestamp" not in names or "State" not in names:
        return None
    state, pinged = names.index("State"), names.index("PINGAVG") if "PINGAVG" in names else None

    def is_idle(fields: list[str]) -> bool:
        return "D" not in fields[state] or (pinged is not None and fields[pinged] not in ("", "-"))

    return is_idle


def samples(
    rows: Iterable[tuple[int, list[str]]],
    count: int,
    read_time: Callable[[list[str]], float],
    columns: list[Column],
    path: Path,
    is_idle: Callable[[list[str]], bool] | None = None,
    skip_idle: bool = False,
) -> Samples:
    """The columns of rows of *count* fields, each with the number of its line."""
    times, values = array("d"), [array("f") for _ in columns]
    before: list[float | None] = [None] * len(columns)
    started, group = None, 0  # rows since `group` have the same time
    idle = bytearray()
    for number, fields in rows:
        if len(fields) != count:
            raise wrong(path, number, f"{len(fields)} fields, but {count} columns")
        try:
            time = read_time(fields)
        except ValueError as error:
            raise wrong(path, number, str(error)) from None
        started = time if started is None else started
        time -= started
        if times and time < times[group]:
            raise wrong(path, number, "its time comes before that of the row above")
        if time > MAX_SECONDS:
            raise wrong(path, number, f"more than {MAX_SECONDS / 86400:g} days after the first row")
        if times and time > times[group]:
            _spread(times, group, time)
            group = len(times)
        times.append(time)
        if is_idle is not None:
            idle.append(is_idle(fields))
        for i, column in enumerate(columns):
            before[i] = _value(column, fields[column.index], before[i], path, number)
            values[i].append(before[i])  # type: ignore[arg-type]
    if not times:
        raise SpecError(f"trace {path}: there is no row below the column names")
    length = times[group] + (times[group] - times[group - 1] if group else _ALONE_S)
    _spread(times, group, length)
    left_out = sum(idle)
    if skip_idle:
        times, values, length = _without(times, values, length, idle)
        if not times:
            raise SpecError(f"trace {path}: skip=idle: every row was taken while idle or pinging")
    named = {_PLURAL[c.kind]: v for c, v in zip(columns, values, strict=True)}
    return Samples(_compact(times, length), length, **named, idle_rows=0 if skip_idle else left_out)


def _without(
    times: array[float], values: list[array[float]], length: float, gone: bytearray
) -> tuple[array[float], list[array[float]], float]:
    """The rows that are not *gone*, and the time that they took, one behind the other."""
    kept, columns, at = array("d"), [array("f") for _ in values], 0.0
    for row, begin in enumerate(times):
        if not gone[row]:
            kept.append(at)
            for new, old in zip(columns, values, strict=True):
                new.append(old[row])
            at += (times[row + 1] if row + 1 < len(times) else length) - begin
    return kept, columns, at


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
    names: list[str], way: str, refuse: Callable[[str], SpecError]
) -> tuple[Callable[[list[str]], float], list[Column]]:
    """How to read a row's time, and the columns that say something about this way."""
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise refuse(
            f"separate columns by commas, not by {mark!r}, or say what they are: {_say_columns(names[0].split(mark))}"
        )
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise refuse(f"two columns are called {doubled[:40]!r}")
    if "Timestamp" in names and _GNETTRACK.keys() <= set(names):
        at = names.index("Timestamp")
        chosen = [
            Column(names.index(name), name, kind, factor)
            for name, (kind, of, factor) in _GNETTRACK.items()
            if of == way
        ]
        return lambda fields: _stamp(fields[at]), chosen
    time: tuple[int, float] | None = None
    by_kind: dict[str, dict[str | None, Column]] = {kind: {} for kind in _PLURAL}
    for index, name in enumerate(names):
        if name.startswith("time_") and name[5:] in _TIME_UNITS:
            if time is not None:
                raise refuse("two columns are times")
            time = index, _TIME_UNITS[name[5:]]
            continue
        match = _COLUMN.match(name)
        kind = name if name == "time" else match[1] if match and match[3] is None else None
        if kind is not None:
            units = {
                "time": "time_s or time_ms",
                "rate": "rate_mbps",
                "delay": "delay_ms",
                "loaded_delay": "loaded_delay_ms",
                "loss": "loss_percent or loss_fraction",
            }
            raise refuse(f"column {name!r} does not say its unit; call it for example {units[kind]}")
        if match is None or match[3] not in _UNITS[match[1]]:
            raise refuse(
                f"unknown column {name[:40]!r}{did_you_mean(name[:40], _EXAMPLES)}; {_say_columns(names)}"
            )
        if match[2] in by_kind[match[1]]:
            raise refuse(f"two columns give the {match[1]}")
        by_kind[match[1]][match[2]] = Column(index, name, match[1], _UNITS[match[1]][match[3]])
    if time is None:
        raise refuse(f"no column gives the time: time_s, time_ms or time_us; {_say_columns(names)}")
    columns = [of[way] if way in of else of[None] for of in by_kind.values() if way in of or None in of]
    if not columns:
        other = any(by_kind.values())
        raise refuse(
            f"nothing is said of the way {way}; with column=up or column=down it can have the other's"
            if other
            else f"no column gives a rate, a delay or a loss; {_say_columns(names)}"
        )
    kinds = {column.kind for column in columns}
    if "loaded_delay" in kinds and "delay" not in kinds:
        raise refuse("a delay under load (loaded_delay) is no use without that of an idle link (delay)")
    index, factor = time
    return lambda fields: to_number(fields[index]) * factor, columns


def _say_columns(names: list[str]) -> str:
    """The option that makes a file readable whose columns are called so."""
    if len(names) == 2 and all(_NUMBER.fullmatch(name) for name in names):
        return "without names, seconds and Mbit/s are trace:FILE(columns=time_s+rate_mbps)"
    plain = [name for name in names if name and not set(name) & set("+:,;()") and len(name) < 30]
    one, two = (plain[0], plain[1]) if len(plain) > 1 else ("1", "2")
    return f"or say which are what: trace:FILE(columns={one}:time_s+{two}:rate_mbps)"


def to_number(text: str) -> float:
    """Raises ValueError, with what is wrong, for what is no number."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a number")
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _stamp(text: str) -> float:
    if not _STAMP.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a time such as 2020.02.13_15.02.07")
    try:
        return (datetime.strptime(text, "%Y.%m.%d_%H.%M.%S") - datetime(2000, 1, 1)).total_seconds()
    except ValueError:
        raise ValueError(f"{text!r}: there is no such time") from None


def _value(column: Column, text: str, before: float | None, path: Path, number: int) -> float:
    if text in ("", "-"):
        if before is None:
            raise wrong(path, number, f"{column.name}: no value, and none before it")
        return before
    try:
        value = to_number(text) * column.factor
    except ValueError as error:
        raise wrong(path, number, f"{column.name}: {error}") from None
    if not 0 <= value <= _LIMITS[column.kind]:
        raise wrong(path, number, f"{column.name}: {text[:40]} is out of bounds")
    return value
