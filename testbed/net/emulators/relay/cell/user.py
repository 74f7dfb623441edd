"""One direction of a link in a cell: a `Line` up to its queue, behind which the cell sends."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.impairments.contract import Item
from testbed.net.emulators.relay.line import MAX_HELD_BYTES, Line

if TYPE_CHECKING:
    from testbed.net.emulators.relay.cell.cell import Cell


class User(Line):
    """Its impairments, delay and queue are its own; when the first in its queue has been sent is up to the cell.

    `share`: of the cell's time, as its scheduler set it; `sent`: bytes that have crossed, ever, lower layers' included.
    """

    def __init__(self, deliver: Callable[[bytes], object], seed: int | None, cell: Cell, place: int) -> None:
        super().__init__(deliver, seed)
        self.cell, self.place = cell, place
        self.share = self.speed = self.sent = 0.0
        self.left = 0.0  # bytes of the first in the queue that are still to be sent
        self.done = inf  # when they will have been, as things stand
        self._rate_now, self._rate_until = 0.0, -inf

    @property
    def stage(self) -> Cell:
        return self.cell

    def apply(self, conditions: Conditions, now: float) -> None:
        super().apply(conditions, now)
        self._rate_until = -inf
        self.cell.plan()

    def clear(self) -> None:
        super().clear()
        self.cell.plan()

    def leave(self) -> None:
        self.cell.leave(self)

    def advance(self, now: float) -> None:
        self.cell.advance(now)

    def _unsent(self, now: float) -> float:
        return 0.0  # what is left goes on at the new rate by itself: it is counted in bytes

    def rate(self, now: float) -> tuple[float, float]:
        """Bytes a second that it could send if the cell were all its own, and until when."""
        if now >= self._rate_until:
            self._rate_now, self._rate_until = self._rate.holds(now)
        return self._rate_now, self._rate_until

    def mean_rate(self, begin_s: float, end_s: float) -> float:
        """The same, on average between two times."""
        rate, until = self.rate(begin_s)
        return rate if until >= end_s else self._rate.capacity(begin_s, end_s) / (end_s - begin_s)

    def _travel(self, now: float, arrival: float, frame: bytes, size: int, count: int) -> None:
        if self.held_bytes > MAX_HELD_BYTES:
            self.counted.overrun += count
            return
        self.last_arrival = arrival = max(arrival, self.last_arrival)  # packets keep their order
        self.held_bytes += size
        self.flight.append((arrival, frame, size, count))
        self.cell.expect(arrival)

    def _overtake(self, item: Item) -> None:
        if self.held_bytes > MAX_HELD_BYTES:
            self.counted.overrun += 1
            return
        self.held_bytes += item[2]
        place = len(self.flight)
        while place and self.flight[place - 1][0] > item[0]:
            place -= 1
        self.flight.insert(place, item)
        self.cell.expect(item[0])

    def arrive(self, now: float) -> None:
        """What has reached the cell by then takes its place, or finds the queue full."""
        while self.flight and self.flight[0][0] <= now:
            item, first = self.flight.popleft(), not self.queue
            if first and not self.cell.full_for(self):
                self.queue.append(item)
                self.left = item[2] + item[3] * self._rate.overhead
                continue
            self._wait(item)
            if first and self.queue:
                self.begin(now)

    def room(self) -> float:
        return self._limit_bytes - self.cell.waiting_bytes(self)

    def begin(self, now: float) -> None:
        """What is first in the queue is to be sent next."""
        item = self._head(now)
        if item is None:
            self.left = self.share = 0.0
        else:
            self.left = item[2] + item[3] * self._rate.overhead

    def finish(self, now: float) -> None:
        """The first in the queue has been sent."""
        item = self.queue.popleft()
        self.begin(now)
        self._leave(item, now)
