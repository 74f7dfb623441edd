"""Opportunities to send at given times, as Mahimahi's mm-link(1) replays them (with the methods of a `Schedule`), and the columns
of numbers that schedules hold.

At each time, up to so many bytes of what waits leave; what is not used is lost; a packet larger than what is left takes the next
opportunities, too. Standard library alone: the relay imports it.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from math import floor, inf
from typing import Any, BinaryIO

MILLISECOND = 1e-3


class Deliveries:
    """Opportunities to send `opportunity_bytes` at each of `times_ms`, beginning again after the last of them.

    *times_ms*: whole milliseconds, not descending; a time that is there several times is as many opportunities. The last must
    be above 0. A packet may leave at an opportunity that comes when it does.
    """

    rates = delays = losses = loaded_delays = None
    gives_rate = loop = True

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
        self._round_bytes = len(times_ms) * opportunity_bytes
        self.length_s = self._length_ms * MILLISECOND
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
                rounds = int((left - self._left) // self._round_bytes)
                if rounds > 0:
                    left -= rounds * self._round_bytes
                    self._round += rounds
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
        rounds, index = self._place(time_s)
        return rounds * len(self.times_ms) + index

    def capacity(self, begin_s: float, end_s: float) -> float:
        """Bytes of all opportunities from *begin_s* up to, not at, *end_s*."""
        return (self._before(end_s) - self._before(begin_s)) * self.opportunity_bytes

    def rate_at(self, time_s: float) -> float:
        """Bytes per second in the ten milliseconds around that time."""
        return self.capacity(time_s - 0.005, time_s + 0.005) / 0.01

    def holds(self, time_s: float) -> tuple[float, float]:
        """Bytes per second in the millisecond of that time, all of whose opportunities are spread over it, and when it ends."""
        begins = self._zero + floor((time_s - self._zero) / MILLISECOND + 1e-6) * MILLISECOND
        ends = begins + MILLISECOND
        return self.capacity(begins, ends) / MILLISECOND, ends

    def delay_at(self, time_s: float) -> None:
        """Deliveries say nothing of delay."""

    def loaded_delay_at(self, time_s: float) -> None:
        """Nor of delay under load."""

    def loss_at(self, time_s: float) -> None:
        """Deliveries say nothing of loss."""

    def next_change(self, time_s: float) -> float:
        """The next opportunity after this time."""
        rounds, index = self._place(time_s + 2e-9)
        return self._zero + (rounds * self._length_ms + self.times_ms[index]) * MILLISECOND

    def pack(self, file: BinaryIO) -> dict[str, Any]:
        write(file, "I", self.times_ms)
        return {
            "kind": "deliveries",
            "count": len(self.times_ms),
            "opportunity_bytes": self.opportunity_bytes,
            "offset_s": self.offset_s,
            "origin_s": self.origin_s,
        }


class Milliseconds(Sequence[float]):
    """Times in seconds that are held as whole milliseconds, in half the space: *ms* are unsigned numbers of four bytes."""

    __slots__ = ("ms",)

    def __init__(self, ms: Sequence[int]) -> None:
        self.ms = ms

    def __len__(self) -> int:
        return len(self.ms)

    def __getitem__(self, index: Any) -> Any:
        """Seconds; of a slice, a list of them."""
        held = self.ms[index]
        return held / 1000 if isinstance(held, int) else [ms / 1000 for ms in held]


def write(file: BinaryIO, code: str, numbers: Sequence[float]) -> None:
    """Appends *numbers* as the machine holds them, of the type *code* (see `array`)."""
    if isinstance(numbers, array) and numbers.typecode == code:
        numbers.tofile(file)
    elif isinstance(numbers, memoryview) and numbers.format == code:
        file.write(numbers)
    else:
        array(code, numbers).tofile(file)


assert array("I").itemsize == 4 and array("d").itemsize == 8, sys.platform
