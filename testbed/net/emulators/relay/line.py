"""One direction of a link: packets in, each with the time at which it came, and out, each at its logical time.

    enter ─ impairments ─▶ flight (on the way to the bottleneck) ─▶ queue (drop-tail, or CoDel) ─ rate ─▶ deliver

Every time is *logical*: a packet's arrival at the bottleneck and its departure follow from the times of the packets before it and
the conditions, never from when this process got to run. Running late delays the packets concerned and is counted, but is not
handed on to the next ones, so a saturated link delivers its rate exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sized
from math import inf
from random import Random
from time import monotonic
from typing import Protocol

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.codel import CoDel
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.drop_tail import admitted
from testbed.net.emulators.relay.impairments import chain, lost_alone
from testbed.net.emulators.relay.impairments.contract import Context, Counted, Item, Onward
from testbed.net.emulators.relay.impairments.loss import Lost, surviving
from testbed.net.emulators.relay.rate import Rate, rate_of

HEADERS = packet.HEADERS  # rates and queues count what is behind them
# Under way in one direction: a sender faster than the host's memory is no reason to end.
MAX_HELD_BYTES = 256 << 20


class Stage(Protocol):
    """What packets leave by when it is advanced: a `Line`, or a cell of several."""

    leaves: float
    """When there is more to do."""

    @property
    def flight(self) -> Sized: ...
    @property
    def queue(self) -> Sized: ...
    def advance(self, now: float) -> None: ...


class Line:
    """One direction. Times are seconds of CLOCK_MONOTONIC."""

    def __init__(self, deliver: Callable[[bytes], object], seed: int | None) -> None:
        """*deliver* takes a frame that leaves; it may raise OSError."""
        self.deliver = deliver
        self.chance = Random(seed)
        self.seed = seed
        self.counted = Counted()
        self.flight: deque[Item] = deque()  # on the way to the bottleneck, by arrival
        self.queue: deque[Item] = deque()  # at the bottleneck; the first one is being sent
        self.last_arrival = self.free = self.begins = 0.0
        self.leaves = inf  # when the first in `queue` has been sent
        self.waiting_bytes = self.held_bytes = 0
        self.worst_lateness = self.recent_lateness = 0.0  # ever; since the counters were last read
        self._hurried: float | None = (
            None  # what that was before: what is hurried has no time at which it should leave
        )
        # Bytes left of a packet from that time on, when conditions changed while it was sent.
        self.owed, self.owed_from = 0.0, inf
        self._conditions = Conditions()
        # What they come to; see `apply`.
        self._delay_s = 0.0
        self._impair: Onward | None = None
        self._lost: Lost | None = None  # in place of the above
        self._limit_bytes: float = inf
        self._codel: CoDel | None = None
        self._ecn = False
        self._rate: Rate = rate_of(Conditions())
        self._finish, self._pauses = self._rate.finish, self._rate.pauses

    def apply(self, conditions: Conditions, now: float) -> None:
        """Changes the conditions; what is being sent goes on at the new rate, what is under way arrives as it would have."""
        if self._hurried is not None:
            self.recent_lateness, self._hurried = self._hurried, None
        unsent = self._unsent(now) if self.queue else 0.0
        if conditions.seed is not None and conditions.seed != self.seed:
            self.seed = conditions.seed
            self.chance.seed(self.seed)
        self._conditions, self._delay_s = conditions, conditions.delay_s
        context = Context(
            conditions, self.chance, self.counted, self._travel, self._overtake, self.under_way_bytes
        )
        self._impair, self._lost = chain(context), lost_alone(context)
        self._limit_bytes = inf if conditions.queue_bytes is None else conditions.queue_bytes
        codel = conditions.codel
        self._codel = CoDel(codel.target_s, codel.interval_s, conditions.mtu) if codel else None
        self._ecn = conditions.ecn
        before, self._rate = self._rate, rate_of(conditions)
        self._finish, self._pauses = self._rate.finish, self._rate.pauses
        if unsent and not self._rate.same(before):
            self.begins = self.owed_from = max(now, self.begins)
            self.owed = unsent
            self.leaves = self._finish(self.begins, unsent, 0)

    @property
    def stage(self) -> Stage:
        """What has to be advanced so that packets of this direction leave."""
        return self

    def leave(self) -> None:
        """The link ends, and what is under way is lost."""

    @property
    def under_way(self) -> int:
        """Packets that have entered and not left."""
        return sum(item[3] for items in (self.flight, self.queue) for item in items)

    def under_way_bytes(self, now: float) -> int:
        """The same in bytes, after all that happens up to *now*."""
        self.stage.advance(now)
        return self.held_bytes

    def clear(self) -> None:
        """Drops what is under way, and forgets it: what enters next keeps no order with it and waits for none of it."""
        self.counted.cleared += self.under_way
        self._forget()

    def _forget(self) -> None:
        self.flight.clear()
        self.queue.clear()
        self.last_arrival = self.free = self.begins = self.owed = 0.0
        self.leaves = self.owed_from = inf
        self.waiting_bytes = self.held_bytes = 0

    def hurry(self, now: float) -> None:
        """What is under way arrives at once, in its order; so does what enters from now on, but for what chance loses of it."""
        self.advance(now)
        lateness = self.recent_lateness if self._hurried is None else self._hurried
        for item in (*self.queue, *self.flight):
            self._leave(item, now)
        self._forget()
        conditions = self._conditions
        self.apply(Conditions(loss=conditions.loss, loss_model=conditions.loss_model), now)
        self._hurried = lateness

    def _unsent(self, now: float) -> float:
        """Bytes of the first in the queue that are still to be sent."""
        _, _, size, count = self.queue[0]
        whole = self.begins != self.owed_from
        left = size + count * self._rate.overhead if whole else self.owed
        return left if now <= self.begins else self._rate.unsent(left, self.begins, self.leaves, now)

    def enter(self, frame: bytes, now: float) -> None:
        """A frame has come in, at *now*."""
        size, count, counted = len(frame) - HEADERS, 1, self.counted
        if frame[1]:
            size, count = packet.measure(frame)
        counted.packets += count
        counted.bytes += size
        if self._impair is None:
            self._travel(now, now + self._delay_s, frame, size, count)
            return
        if self._lost is not None:
            self._thin(frame, now, size, count)
            return
        for piece in packet.split(frame) if count > 1 else (frame,):
            self._impair(piece, now)

    def _thin(self, frame: bytes, now: float, size: int, count: int) -> None:
        """Loses each packet that a frame stands for or not; those in a row that are left travel on as one frame."""
        assert self._lost is not None
        arrival, left = now + self._delay_s, 0
        for first, kept in surviving(self._lost, count):
            left += kept
            if kept == count:
                self._travel(now, arrival, frame, size, count)
            else:
                piece = packet.cut(frame, first, kept)
                self._travel(now, arrival, piece, packet.measure(piece)[0], kept)
        self.counted.dropped_loss += count - left

    def _travel(self, now: float, arrival: float, frame: bytes, size: int, count: int) -> None:
        if self.held_bytes > MAX_HELD_BYTES:
            self.counted.overrun += count
            return
        if arrival < self.last_arrival:
            arrival = self.last_arrival  # packets keep their order
        self.last_arrival = arrival
        self.held_bytes += size
        if self.queue:
            self.flight.append((arrival, frame, size, count))
            if self._pauses and self.leaves > now:
                # In an outage nothing leaves for long: what finds the queue full must not pile up here.
                self._arrive(now)
        else:
            self._begin((arrival, frame, size, count))

    def _overtake(self, item: Item) -> None:
        """A packet that may arrive before those that entered before it."""
        if self.held_bytes > MAX_HELD_BYTES:
            self.counted.overrun += 1
            return
        self.held_bytes += item[2]
        arrival = item[0]
        if self.queue and arrival >= self.queue[0][0]:
            place = len(self.flight)
            while place and self.flight[place - 1][0] > arrival:
                place -= 1
            self.flight.insert(place, item)
            return
        if self.queue and self.begins > arrival:  # the first has not arrived yet: it goes back to the others
            self.flight.appendleft(self.queue.popleft())
        self._begin(item) if not self.queue else self.flight.appendleft(item)

    def _begin(self, item: Item) -> None:
        # Nothing is in front of it, so when it will have been sent is known before it arrives: one event less.
        arrival, _, size, count = item
        self.queue.append(item)
        self.begins = begins = arrival if arrival > self.free else self.free
        self.leaves = self._finish(begins, size, count)

    def advance(self, now: float) -> None:
        """Everything that happens up to *now*, in the order in which it happens. `leaves` says when there is more to do."""
        queue, flight = self.queue, self.flight
        while self.leaves <= now:
            logical = self.leaves
            if flight and flight[0][0] < logical:
                self._arrive(logical)  # these find the first in the queue still being sent
            item = queue.popleft()
            self.free = logical
            self._next(logical)
            self._leave(item, logical)
        if queue:
            self._arrive(now)

    def _arrive(self, before: float) -> None:
        """What has reached the bottleneck before this time takes its place in the queue, or finds it full."""
        flight = self.flight
        while flight and flight[0][0] < before:
            self._wait(flight.popleft())

    def _next(self, now: float) -> None:
        """What comes to the head of the queue, or will, is being sent from *now* on."""
        item = self._head(now)
        if item is not None:
            self.begins = now
            self.leaves = self._finish(now, item[2], item[3])
        elif self.flight:
            self._begin(self.flight.popleft())
        else:
            self.leaves = inf

    def _head(self, now: float) -> Item | None:
        """What is first in the queue, and waits no longer; None: all that was in it has been dropped, or nothing was."""
        queue = self.queue
        while queue:
            item = queue[0]
            if self._codel is not None and self._codel.condemns(now - item[0], now, self.waiting_bytes):
                marked = packet.mark_congestion(item[1]) if self._ecn else None
                if marked is None:
                    queue.popleft()
                    self.waiting_bytes -= item[2]
                    self.held_bytes -= item[2]
                    self.counted.dropped_aqm += item[3]
                    continue
                self.counted.marked += item[3]
                queue[0] = item = (item[0], marked, item[2], item[3])
            self.waiting_bytes -= item[2]
            return item
        return None

    def room(self) -> float:
        """Bytes that the queue has room for."""
        return self._limit_bytes - self.waiting_bytes

    def _wait(self, item: Item) -> None:
        """A packet has arrived at the bottleneck while another is being sent."""
        _, _, size, count = item
        room = self.room()
        kept = item if size <= room else admitted(item, room)
        if kept is not None:
            self.waiting_bytes += kept[2]
            self.queue.append(kept)
            if kept is item:
                return
            size, count = size - kept[2], count - kept[3]
        self.counted.dropped_queue += count
        self.held_bytes -= size

    def _leave(self, item: Item, logical: float) -> None:
        _, frame, size, count = item
        self.held_bytes -= size
        lateness = monotonic() - logical
        if lateness > self.recent_lateness:
            self.recent_lateness = lateness
        try:
            self.deliver(frame)
        except OSError:  # the interface is down or gone
            self.counted.overrun += count
        else:
            self.counted.delivered += count

    def counters(self) -> dict[str, float]:
        """See `testbed.net.emulators.emulator.Counters`. What is recent begins anew."""
        recent, self.recent_lateness = self.recent_lateness, 0.0
        if self._hurried is not None:
            recent, self._hurried = self._hurried, 0.0
        self.worst_lateness = max(self.worst_lateness, recent)
        return vars(self.counted) | {"worst_lateness_s": self.worst_lateness, "recent_lateness_s": recent}
