"""Files of whatever columns, as somebody says what they are: ``columns=NAME:time_s+Throughput:rate_mbps`` by the file's own names
or numbers (from 1), or ``columns=time_s+-+rate_mbps`` one after the other (``-``: none of these); ``every=10ms``: rows without a
time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError
from testbed.net.profile.recordings.recording import Samples, lines_that_say, wrong
from testbed.net.profile.recordings.tables import Column, meaning, samples, to_number

#: What separates fields, the first that a line has; else blanks.
_MARKS = ",;\t|"
_STAMP = "time_stamp"
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Item:
    """One column that is wanted: its name or number (from 1) in the file, and what it is; empty: nothing."""

    place: str
    means: str


def parse_columns(text: str) -> tuple[Item, ...]:
    """``"time_s+rate_mbps"`` -> items. Raises SpecError where one is no meaning, or none says anything of a link."""
    items = []
    for position, part in enumerate(text.split("+"), 1):
        place, colon, means = part.strip().rpartition(":")
        if means != "-" and means != _STAMP and meaning(means) is None and not means.startswith("time_"):
            raise SpecError(
                f"columns: {means[:40]!r} is no meaning; write {_STAMP}, time_s, rate_mbps, rate_down_kbps, delay_ms, "
                "loss_percent or -"
            )
        if means.startswith("time_") and means not in (_STAMP, "time_s", "time_ms", "time_us"):
            raise SpecError(f"columns: {means[:40]!r}: times are time_s, time_ms, time_us or {_STAMP}")
        items.append(Item(place if colon else str(position), "" if means == "-" else means))
    if not any(meaning(item.means) for item in items):
        raise SpecError("columns: none is a rate, a delay or a loss")
    if sum(item.means.startswith("time_") for item in items) > 1:
        raise SpecError("columns: two are times")
    return tuple(items)


def read_columns(file: BinaryIO, path: Path, way: str, text: str, every_s: float) -> Samples:
    """The samples of an open file whose columns are said. Raises SpecError, with the line it dislikes."""
    items = parse_columns(text)
    timed = next((item for item in items if item.means.startswith("time_")), None)
    if timed is None and not every_s:
        raise SpecError(
            f"trace {path}: columns: none is the time; add every=1s, or the interval that its rows have"
        )
    if timed is not None and every_s:
        raise SpecError(f"trace {path}: every: a column is the time already")
    lines = lines_that_say(file, path)
    at, first = next(lines, (1, ""))
    if not first:
        raise SpecError(f"trace {path}: the file is empty")
    mark = next((mark for mark in _MARKS if mark in first), None)
    heads = _fields(first, mark)
    named = any(not item.place.isdigit() for item in items)
    places = {item: _place(item, heads, named, path, at) for item in items if item.means}
    known = [heads[place] for item, place in places.items() if item.means != _STAMP]
    begins_with_names = named or not all(_NUMBER.fullmatch(field) or field in ("", "-") for field in known)
    read_time = _reader(timed, places, every_s)
    wanted = _wanted(places, way)
    if not wanted:
        raise wrong(
            path, at, f"columns: nothing is said of the way {way}; with column= it can have the other's"
        )

    def rows() -> Iterator[tuple[int, list[str]]]:
        if not begins_with_names:
            yield at, heads
        for number, line in lines:
            yield number, _fields(line, mark)

    return samples(rows(), len(heads), read_time, wanted, path)


def _fields(line: str, mark: str | None) -> list[str]:
    return [field.strip().strip('"') for field in line.split(mark)]


def _place(item: Item, heads: list[str], named: bool, path: Path, at: int) -> int:
    """The index of a column."""
    if named and item.place in heads:
        return heads.index(item.place)
    if item.place.isdigit() and 1 <= int(item.place) <= len(heads):
        return int(item.place) - 1
    has = f"it has {len(heads)}: {', '.join(heads)[:200]}"
    raise wrong(path, at, f"columns: there is no column {item.place[:40]!r}; {has}")


def _reader(timed: Item | None, places: dict[Item, int], every_s: float) -> Callable[[list[str]], float]:
    if timed is None:
        numbers = count()
        return lambda _: next(numbers) * every_s
    place = places[timed]
    if timed.means == _STAMP:
        return lambda fields: _stamp(fields[place])
    factor = {"time_s": 1.0, "time_ms": 1e-3, "time_us": 1e-6}[timed.means]
    return lambda fields: to_number(fields[place]) * factor


def _stamp(text: str) -> float:
    try:
        return (datetime.fromisoformat(text).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:40]!r} is not a time such as 2020-02-13 15:02:07") from None


def _wanted(places: dict[Item, int], way: str) -> list[Column]:
    """The columns that say something of this way; its own before those of both."""
    found: dict[str, tuple[bool, Column]] = {}
    for item, place in places.items():
        known = meaning(item.means)
        if known is None:
            continue
        kind, of, factor = known
        if of not in (None, way):
            continue
        if kind not in found or (of is not None and not found[kind][0]):
            found[kind] = of is not None, Column(place, f"column {place + 1} ({item.means})", kind, factor)
    return [column for _, column in found.values()]
