"""Conditions that change over time, as an emulator follows them: when will these bytes have been sent?

Standard library alone: the relay loads this file by its path (see relay.py). Nothing here reads files or knows what a profile
is; `testbed.net.trace` makes schedules out of traces, and `pack` and `unpack` take them to another process without a copy.

Two kinds, with the same methods. A `Schedule` has a rate, delay or loss that holds from one time to the next. `Deliveries` are
opportunities of a fixed size at given milliseconds, as Mahimahi's mm-link(1) replays them: at each, up to that many bytes of what
waits leave; what is not used is lost; a packet larger than what is left takes the next opportunities, too.

All times are seconds of one clock. `origin_s` is when the trace begins; before it, the first values hold.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import floor, inf
from typing import Any, BinaryIO

MILLISECOND = 1e-3
_NOTHING = 1e-9  # bytes: what rounding leaves of a packet that has been sent
_COLUMNS = ("rates", "delays", "losses")


class Milliseconds(Sequence[float]):
    """Times in seconds that are held as whole milliseconds, in half the space: *ms* are unsigned numbers of four bytes."""

    __slots__ = ("ms",)

    def __init__(self, ms: Sequence[int]) -> None:
        self.ms = ms

    def __len__(self) -> int:
        return len(self.ms)

    def __getitem__(self, index: Any) -> Any:
        """Seconds; of a slice, a list of them."""
        found = self.ms[index]
        return found / 1000 if isinstance(found, int) else [ms / 1000 for ms in found]


class Schedule:
    """Values that hold from `times` to the next of them.

    *times*: seconds, ascending, the first is 0; *length_s*: when the last value ends. *rates*: bytes per second, 0 in an
    outage, inf without a limit, multiplied with *scale*; *delays*: seconds; *losses*: fractions; None for what does not
    change. At the end the trace begins again (*loop*) or its last values hold. *offset_s*: where in the trace it starts at
    `origin_s`.
    """

    opportunity_bytes = None

    def __init__(
        self,
        times: Sequence[float],
        length_s: float,
        *,
        rates: Sequence[float] | None = None,
        delays: Sequence[float] | None = None,
        losses: Sequence[float] | None = None,
        scale: float = 1.0,
        loop: bool = True,
        offset_s: float = 0.0,
        origin_s: float = 0.0,
    ) -> None:
        self.times, self.length_s = times, length_s
        self.rates, self.delays, self.losses = rates, delays, losses
        self.scale, self.loop, self.offset_s = scale, loop, offset_s
        self._dead = rates is not None and not (scale and max(rates) > 0)
        self.start(origin_s)

    def start(self, origin_s: float) -> None:
        """The trace begins at this time."""
        self.origin_s = origin_s
        self._zero = origin_s - self.offset_s
        self._sending = _Cursor(self.times, self.length_s, self.loop)
        self._looking = _Cursor(self.times, self.length_s, self.loop)

    def finish(self, begin_s: float, size: float) -> float:
        """When *size* bytes have been sent whose first is sent no earlier than *begin_s*; inf: never.

        Amortised constant time for ascending *begin_s*.
        """
        rates, scale, zero, cursor = self.rates, self.scale, self._zero, self._sending
        if rates is None:
            return begin_s
        if self._dead:
            return inf
        now = begin_s - zero
        cursor.seek(now)
        left = size
        while True:
            rate = rates[cursor.index] * scale
            if rate:
                done = now + left / rate
                if done <= cursor.ends:
                    return max(begin_s, done + zero)
                left -= (cursor.ends - now) * rate
            now = cursor.ends
            if now == inf:
                return inf
            if left <= _NOTHING:
                return now + zero
            cursor.advance()

    def capacity(self, begin_s: float, end_s: float) -> float:
        """Bytes that can be sent between two times; inf where the rate is not limited."""
        if self.rates is None:
            return inf
        now, end, total = begin_s - self._zero, end_s - self._zero, 0.0
        cursor = _Cursor(self.times, self.length_s, self.loop)
        cursor.seek(now)
        while now < end:
            until = min(end, cursor.ends)
            rate = self.rates[cursor.index] * self.scale
            if rate:
                total += rate * (until - now)
            now = until
            if now < end:
                cursor.advance()
        return total

    def rate_at(self, time_s: float) -> float | None:
        """Bytes per second at that time; None where the schedule has no rates."""
        if self.rates is None:
            return None
        return self.rates[self._looking.seek(time_s - self._zero)] * self.scale

    def delay_at(self, time_s: float) -> float | None:
        """Seconds, for a packet that enters at that time; None where the schedule has no delays."""
        return None if self.delays is None else self.delays[self._looking.seek(time_s - self._zero)]

    def loss_at(self, time_s: float) -> float | None:
        """The probability that a packet that enters at that time is lost; None where the schedule has no losses."""
        return None if self.losses is None else self.losses[self._looking.seek(time_s - self._zero)]

    def next_change(self, time_s: float) -> float:
        """The next time after this one at which other values begin to hold; inf: none."""
        self._looking.seek(time_s - self._zero)
        return self._looking.ends + self._zero

    def pack(self, file: BinaryIO) -> dict[str, Any]:
        """Writes the numbers to *file*; what is returned (plain values for JSON) and the file are what `unpack` takes."""
        columns = [name for name in _COLUMNS if getattr(self, name) is not None]
        whole = isinstance(self.times, Milliseconds)
        _write(
            file, "I" if whole else "d", self.times.ms if isinstance(self.times, Milliseconds) else self.times
        )
        for name in columns:
            _write(file, "f", getattr(self, name))
        return {
            "kind": "schedule",
            "count": len(self.times),
            "columns": columns,
            "milliseconds": whole,
            "length_s": self.length_s,
            "scale": self.scale,
            "loop": self.loop,
            "offset_s": self.offset_s,
            "origin_s": self.origin_s,
        }


class _Cursor:
    """A place in a schedule: the segment `index`, which `ends` when the next one begins. Moves forward at no cost."""

    __slots__ = ("base", "ends", "index", "length", "loop", "starts", "times")

    def __init__(self, times: Sequence[float], length_s: float, loop: bool) -> None:
        self.times, self.length, self.loop = times, length_s, loop
        self.base = 0.0  # when this round of the loop began
        self.starts = self.ends = inf  # no place yet
        self.index = 0

    def seek(self, now: float) -> int:
        """Goes to the segment that holds at *now*, and says which."""
        if self.starts <= now < self.ends:
            return self.index
        if self.loop and now >= self.length:
            self.base = floor(now / self.length) * self.length
            if now - self.base >= self.length:  # rounding
                self.base += self.length
        else:
            self.base = 0.0
        self.index = max(0, bisect_right(self.times, now - self.base) - 1)
        self._measure()
        return self.index

    def advance(self) -> None:
        """Goes to the next segment."""
        self.index += 1
        if self.index == len(self.times):
            self.index = 0
            self.base += self.length
        self._measure()

    def _measure(self) -> None:
        first, last = self.index == 0 and not self.base, self.index == len(self.times) - 1
        self.starts = -inf if first else self.base + self.times[self.index]
        if not last:
            self.ends = self.base + self.times[self.index + 1]
        else:
            self.ends = self.base + self.length if self.loop else inf


class Deliveries:
    """Opportunities to send `opportunity_bytes` at each of `times_ms`, beginning again after the last of them.

    *times_ms*: whole milliseconds, not descending; a time that is there several times is as many opportunities. The last must
    be above 0. A packet may leave at an opportunity that comes when it does.
    """

    rates = delays = losses = None
    loop = True

    def __init__(
        self,
        times_ms: Sequence[int],
        opportunity_bytes: float = 1500.0,
        *,
        offset_s: float = 0.0,
        origin_s: float = 0.0,
    ) -> None:
        self.times_ms, self.opportunity_bytes, self.offset_s = times_ms, opportunity_bytes, offset_s
        self._length_ms = times_ms[-1]
        self.length_s = self._length_ms * MILLISECOND
        self.start(origin_s)

    def start(self, origin_s: float) -> None:
        """The trace begins at this time."""
        self.origin_s = origin_s
        self._zero = origin_s - self.offset_s
        self._index = self._round = 0
        self._left = 0.0  # bytes of the opportunity at `_index` that nothing has used
        self._at = -inf  # when the last packet left

    def finish(self, begin_s: float, size: float) -> float:
        """See `Schedule.finish`. What a packet leaves of its last opportunity is for one that was waiting already."""
        if not self.opportunity_bytes:
            return inf
        if begin_s != self._at:
            self._round, self._index = self._place(begin_s)
            self._left = self.opportunity_bytes
        left = size
        while self._left < left:
            left -= self._left
            self._left = self.opportunity_bytes
            self._index += 1
            if self._index == len(self.times_ms):
                self._index = 0
                self._round += 1
        self._left -= left
        at = self._zero + (self._round * self._length_ms + self.times_ms[self._index]) * MILLISECOND
        self._at = max(begin_s, at)
        return self._at

    def _place(self, time_s: float) -> tuple[int, int]:
        """Round and index of the first opportunity that is not before this time."""
        now = (time_s - self._zero) / MILLISECOND - 1e-6  # a nanosecond: rounding
        rounds = max(0, floor(now / self._length_ms))
        index = bisect_left(self.times_ms, now - rounds * self._length_ms)
        if index == len(self.times_ms):
            return rounds + 1, 0
        # The last opportunity of a round and the first of the next may come at the same time.
        return rounds, index

    def _before(self, time_s: float) -> int:
        """How many opportunities come before this time."""
        now = (time_s - self._zero) / MILLISECOND - 1e-6
        if now < 0:
            return 0
        rounds = floor(now / self._length_ms)
        inside = bisect_left(self.times_ms, now - rounds * self._length_ms)
        # That of the round before may come in this one's first moment, and is before all of it.
        return rounds * len(self.times_ms) + inside

    def capacity(self, begin_s: float, end_s: float) -> float:
        """Bytes of all opportunities from *begin_s* up to, not at, *end_s*."""
        return (self._before(end_s) - self._before(begin_s)) * self.opportunity_bytes

    def rate_at(self, time_s: float) -> float:
        """Bytes per second in the ten milliseconds around that time."""
        return self.capacity(time_s - 0.005, time_s + 0.005) / 0.01

    def delay_at(self, time_s: float) -> None:
        """Deliveries say nothing of delay."""

    def loss_at(self, time_s: float) -> None:
        """Deliveries say nothing of loss."""

    def next_change(self, time_s: float) -> float:
        """The next opportunity after this time."""
        rounds, index = self._place(time_s + 2e-9)
        return self._zero + (rounds * self._length_ms + self.times_ms[index]) * MILLISECOND

    def pack(self, file: BinaryIO) -> dict[str, Any]:
        """See `Schedule.pack`."""
        _write(file, "I", self.times_ms)
        return {
            "kind": "deliveries",
            "count": len(self.times_ms),
            "opportunity_bytes": self.opportunity_bytes,
            "offset_s": self.offset_s,
            "origin_s": self.origin_s,
        }


def unpack(description: dict[str, Any], file: int) -> Schedule | Deliveries:
    """The schedule that `pack` wrote to the file with this descriptor. The numbers stay in the file, which may be closed."""
    count = description["count"]
    mapped = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))
    if description["kind"] == "deliveries":
        return Deliveries(
            mapped[: 4 * count].cast("I"),
            description["opportunity_bytes"],
            offset_s=description["offset_s"],
            origin_s=description["origin_s"],
        )
    size = 4 if description["milliseconds"] else 8
    times = mapped[: size * count]
    columns: dict[str, Any] = {
        name: mapped[(size + 4 * i) * count : (size + 4 + 4 * i) * count].cast("f")
        for i, name in enumerate(description["columns"])
    }
    rest = {key: description[key] for key in ("length_s", "scale", "loop", "offset_s", "origin_s")}
    return Schedule(Milliseconds(times.cast("I")) if size == 4 else times.cast("d"), **columns, **rest)


def _write(file: BinaryIO, code: str, numbers: Sequence[float]) -> None:
    if isinstance(numbers, array) and numbers.typecode == code:
        numbers.tofile(file)
    elif isinstance(numbers, memoryview) and numbers.format == code:
        file.write(numbers)
    else:
        array(code, numbers).tofile(file)


assert array("I").itemsize == 4 and array("d").itemsize == 8, sys.platform
