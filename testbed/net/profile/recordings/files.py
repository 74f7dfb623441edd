"""A recording from its file, of whichever kind that is; the last few are kept. Read here: packet-delivery files, as Mahimahi's
mm-link(1) replays them, a whole number of milliseconds on each line. `tables` reads the others.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError
from testbed.files import open_named
from testbed.net.profile.recordings.columns import read_columns
from testbed.net.profile.recordings.netem_trace import is_model, read_model
from testbed.net.profile.recordings.recording import (
    BYTE_ORDER_MARK,
    MAX_LINE,
    MAX_SECONDS,
    DeliveryTimes,
    Recording,
    Samples,
    first_line,
    says_nothing,
    wrong,
)
from testbed.net.profile.recordings.tables import headless, read_headless_table, read_table

MAX_FILE_BYTES = 1 << 30
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
#: The option that makes a file readable of one number a line, where these are no times of deliveries.
_ONE_COLUMN = "delays, a line every 10 ms, are trace:FILE(columns=delay_ms,every=10ms), rates (columns=rate_mbps,every=1s)"


@dataclass(frozen=True)
class Layout:
    """What is said of a file besides: its `columns` (see `columns`), how far its rows are apart, and what of it is left out."""

    columns: str = ""
    every_s: float = 0.0
    skip: str = ""


def read_recording(path: Path, way: str, layout: Layout = Layout()) -> Recording:
    """The recording in a file, for the way ``up`` or ``down``. Raises SpecError, with the line it dislikes.

    The last few are kept, until their file changes.
    """
    try:
        with open_named(path) as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise SpecError(f"trace {path}: {error.strerror}") from None
    if status.st_size > MAX_FILE_BYTES:
        raise SpecError(f"trace {path}: larger than {MAX_FILE_BYTES >> 20} MiB")
    ways = _ways(path.absolute(), status.st_mtime_ns, status.st_size, layout)
    if way not in ways:
        other = next(iter(ways.values()), None)
        if isinstance(other, DeliveryTimes):
            ways[way] = other  # such a file says nothing of ways
        else:
            ways[way] = _sharing(_read(path, way, layout), other)
    return ways[way]


@lru_cache(maxsize=8)
def _ways(path: Path, changed_ns: int, size: int, layout: Layout) -> dict[str, Recording]:
    """What has been read of a file, by the way."""
    return {}


def _sharing(new: Recording, other: Samples | None) -> Recording:
    """*new*, but what is the same for the other way is held once."""
    if other is None or not isinstance(new, Samples):
        return new
    same = {}
    for name in ("times", "rates", "delays", "losses", "loaded_delays"):
        mine, its = getattr(new, name), getattr(other, name)
        if mine is not None and its is not None and len(mine) == len(its) and _equal(mine, its):
            same[name] = its
    return replace(new, **same)


def _equal(one: Iterable[float], other: Iterable[float]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=True))


def _read(path: Path, way: str, layout: Layout) -> Recording:
    try:
        with open_named(path) as file:
            first = first_line(file, path)
            file.seek(0)
            if layout.skip and (
                layout.columns or is_model(first, path) or first.isdigit() or headless(first)
            ):
                raise SpecError(
                    f"trace {path}: skip={layout.skip}: of logs of G-NetTrack, whose State says so; this is none"
                )
            if layout.columns:
                return read_columns(file, path, way, layout.columns, layout.every_s)
            if is_model(first, path):
                return read_model(file, path)
            if first.isdigit():
                return read_delivery_times(file, path)
            if _NUMBER.fullmatch(first):
                raise wrong(
                    path, 1, f"{first[:40].decode()!r} is not a whole number of milliseconds; {_ONE_COLUMN}"
                )
            if headless(first):
                return read_headless_table(file, path)
            return read_table(file, path, way, layout.skip == "idle")
    except OSError as error:
        raise SpecError(f"trace {path}: {error.strerror}") from None


_CHUNK = 1 << 20


def read_delivery_times(file: BinaryIO, path: Path) -> DeliveryTimes:
    """The times in an open file; *path*: what it is called. Raises SpecError, with the line it dislikes."""
    times: array[int] = array("I")
    rest, last, lines = b"", 0, 0
    while piece := file.read(_CHUNK):
        if not lines and not rest:
            piece = piece.removeprefix(BYTE_ORDER_MARK)
        whole, newline, rest = (rest + piece).rpartition(b"\n")
        if newline:
            last = _add_times(times, whole, last, lines, path)
            lines += whole.count(b"\n") + 1
        if len(rest) > MAX_LINE:
            raise wrong(path, lines + 1, f"longer than {MAX_LINE} characters")
    if rest:
        _add_times(times, rest, last, lines, path)
    if not times or times[-1] == 0:
        raise SpecError(f"trace {path}: no delivery after the time 0, so it has no length")
    return DeliveryTimes(times)


def _add_times(times: array[int], text: bytes, last: int, lines: int, path: Path) -> int:
    """Appends whole lines' numbers; returns the last one. Fast where all is well, line by line where something is not.

    *lines*: how many came before.
    """
    text = text.replace(b"\r\n", b"\n").removesuffix(b"\r")
    if text and not text.translate(None, b"0123456789\n"):
        import numpy as np  # an hour is millions of lines: seven times as fast as int()

        numbers = np.fromstring(text, dtype=np.int64, sep="\n")
        complete = len(numbers) == text.count(b"\n") + 1
        if (
            complete
            and numbers[0] >= last
            and numbers[-1] <= MAX_SECONDS * 1e3
            and not (np.diff(numbers) < 0).any()
        ):
            times.frombytes(numbers.astype(np.uint32).tobytes())
            return int(numbers[-1])
    for number, line in enumerate(text.split(b"\n"), lines + 1):
        if says_nothing(line):
            continue
        line, shown = line.strip(), line.strip()[:40].decode(errors="replace")
        if not line.isdigit() or len(line) > 12:
            raise wrong(path, number, f"{shown!r} is not a whole number of milliseconds; {_ONE_COLUMN}")
        if int(line) < last:
            raise wrong(path, number, f"{shown} comes before the line above, {last}; {_ONE_COLUMN}")
        if int(line) > MAX_SECONDS * 1e3:
            raise wrong(path, number, f"{shown} ms is more than {MAX_SECONDS / 86400:g} days")
        last = int(line)
        times.append(last)
    return last
