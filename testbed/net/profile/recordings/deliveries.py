"""Packet-delivery files, as Mahimahi's mm-link(1) replays them: a whole number of milliseconds on each line."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError
from testbed.net.profile.recordings.lines import BYTE_ORDER_MARK, MAX_LINE, says_nothing, wrong
from testbed.net.profile.recordings.recording import MAX_SECONDS, DeliveryTimes

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
    for number, line in enumerate(text.split(b"\n"), lines + 1):
        if says_nothing(line):
            continue
        line, shown = line.strip(), line.strip()[:40].decode(errors="replace")
        if not line.isdigit() or len(line) > 12:
            raise wrong(path, number, f"{shown!r} is not a whole number of milliseconds")
        if int(line) < last:
            raise wrong(path, number, f"{shown} comes before the line above, {last}")
        if int(line) > MAX_SECONDS * 1e3:
            raise wrong(path, number, f"{shown} ms is more than {MAX_SECONDS / 86400:g} days")
        last = int(line)
        times.append(last)
    return last
