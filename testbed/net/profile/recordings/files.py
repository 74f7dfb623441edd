"""A recording from its file, of whichever kind that is; the last few are kept."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from testbed.errors import SpecError
from testbed.files import open_named
from testbed.net.profile.recordings.deliveries import read_delivery_times
from testbed.net.profile.recordings.lines import first_line
from testbed.net.profile.recordings.recording import DeliveryTimes, Recording, Samples
from testbed.net.profile.recordings.tables import headless, read_headless_table, read_table

MAX_FILE_BYTES = 1 << 30


def read_recording(path: Path, way: str) -> Recording:
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
        with open_named(path) as file:
            first = first_line(file, path)
            file.seek(0)
            if first.isdigit():
                return read_delivery_times(file, path)
            if headless(first):
                return read_headless_table(file, path)
            return read_table(file, path, way)
    except OSError as error:
        raise SpecError(f"trace {path}: {error.strerror}") from None
