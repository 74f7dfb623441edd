"""Conditions that change over time, as an emulator follows them: when will these bytes have been sent?

Standard library alone: the relay imports this file. Nothing here reads files or knows what a profile is; `trace`
makes schedules out of traces, and `pack` and `unpack` take them to another process without a copy.

Two kinds, with the same methods. A `Schedule` has a rate, delay or loss that holds from one time to the next. `Deliveries`
(`testbed.net.profile.deliveries`) are opportunities of a fixed size at given milliseconds.

All times are seconds of one clock. `origin_s` is when the trace begins; before it, the first values hold.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil, floor, inf
from typing import Any, BinaryIO

from testbed.net.profile.deliveries import Deliveries, Milliseconds, write

_NOTHING = 1e-9  # bytes: what rounding leaves of a packet that has been sent
_COLUMNS = ("rates", "delays", "losses", "loaded_delays")


class Schedule:
    """Values that hold from `times` to the next of them.

    *times*: seconds, ascending, the first is 0; *length_s*: when the last value ends. *rates*: bytes per second, 0 in an
    outage, inf without a limit, multiplied with *scale*; *delays*: seconds; *losses*: fractions; *loaded_delays*: seconds,
    those of packets that enter under load, beside *delays*, those of all others; None for what does not
    change. At the end the trace begins again (*loop*) or its last values hold. *offset_s*: where in the trace it starts at
    `origin_s`.
    """

    def __init__(
        self,
        times: Sequence[float],
        length_s: float,
        *,
        rates: Sequence[float] | None = None,
        delays: Sequence[float] | None = None,
        losses: Sequence[float] | None = None,
        loaded_delays: Sequence[float] | None = None,
        scale: float = 1.0,
        loop: bool = True,
        offset_s: float = 0.0,
        origin_s: float = 0.0,
    ) -> None:
        self.times, self.length_s = times, length_s
        self.rates, self.delays, self.losses, self.loaded_delays = rates, delays, losses, loaded_delays
        self.scale, self.loop, self.offset_s = scale, loop, offset_s
        self._dead = rates is not None and not (scale and max(rates) > 0)
        self.origin_s = origin_s
        self._zero = origin_s - self.offset_s
        self._sending = _Cursor(self.times, self.length_s, self.loop)
        self._looking = _Cursor(self.times, self.length_s, self.loop)

    @property
    def gives_rate(self) -> bool:
        """Whether it says how fast a link sends."""
        return self.rates is not None

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
        left, left_before = size, None  # bytes; at the last round's beginning
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
            if cursor.index == 0:
                # A round that sends next to nothing is not walked through again and again.
                if left_before is not None and left_before - left < left:
                    if left_before == left:
                        return inf
                    sent = left_before - left
                    rounds = ceil(left / sent) - 1
                    left -= rounds * sent
                    cursor.skip(rounds)
                    now = cursor.base
                left_before = left

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

    def holds(self, time_s: float) -> tuple[float, float]:
        """Bytes per second from that time on (inf: without a limit), and until when, which is later."""
        later = time_s + 1e-9  # rounding must not find the stretch that ends just then
        rate = self.rate_at(later)
        return inf if rate is None else rate, max(later, self.next_change(later))

    def delay_at(self, time_s: float) -> float | None:
        """Seconds, for a packet that enters at that time; None where the schedule has no delays."""
        return None if self.delays is None else self.delays[self._looking.seek(time_s - self._zero)]

    def loaded_delay_at(self, time_s: float) -> float | None:
        """The same for a packet that enters under load; None where the schedule makes no difference."""
        if self.loaded_delays is None:
            return None
        return self.loaded_delays[self._looking.seek(time_s - self._zero)]

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
        write(
            file, "I" if whole else "d", self.times.ms if isinstance(self.times, Milliseconds) else self.times
        )
        for name in columns:
            write(file, "f", getattr(self, name))
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

    def skip(self, rounds: float) -> None:
        """Goes to the same segment, so many rounds of the loop later."""
        self.base += rounds * self.length
        self._measure()

    def _measure(self) -> None:
        first, last = self.index == 0 and not self.base, self.index == len(self.times) - 1
        self.starts = -inf if first else self.base + self.times[self.index]
        if not last:
            self.ends = self.base + self.times[self.index + 1]
        else:
            self.ends = self.base + self.length if self.loop else inf


def unpack(description: dict[str, Any], file: int) -> Schedule | Deliveries:
    """The schedule that a `pack` wrote to the file with this descriptor. The numbers stay in the file, which may be closed."""
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
