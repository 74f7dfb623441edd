"""One direction of a link: packets in, each with the time at which it came, and out, each at its logical time.

    enter ─ duplicate ─ lose or mark ─ corrupt ─▶ flight (delay, jitter, order) ─▶ queue (drop-tail or CoDel) ─ rate ─▶ deliver

Every time is *logical*: a packet's arrival at the bottleneck and its departure follow from the times of the packets before it and
the conditions, never from when this process got to run. Running late delays the packets concerned and is counted, but is not
handed on to the next ones, so a saturated link delivers its rate exactly.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.codel import CoDel
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.jitter import Jitter, unpack
from testbed.net.emulators.relay.loss import Independent, Loss, loss_of

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.schedule import Schedule

HEADERS = packet.HEADERS  # rates and queues count what is behind them
# Under way in one direction: a sender faster than the host's memory is no reason to end.
MAX_HELD_BYTES = 256 << 20

Item = tuple[float, bytes, int, int]
"""Arrival at the bottleneck, frame, bytes of the network layer, packets (several in a super-packet)."""


class Line:
    """One direction. Times are seconds of CLOCK_MONOTONIC."""

    COUNTED: tuple[str, ...] = (
        *("packets", "entered_bytes", "dropped_loss", "dropped_queue", "dropped_aqm", "marked"),
        *("duplicated", "corrupted", "reordered", "delivered", "overrun", "cleared"),
    )
    packets: int
    entered_bytes: int
    dropped_loss: int
    dropped_queue: int
    dropped_aqm: int
    marked: int
    duplicated: int
    corrupted: int
    reordered: int
    delivered: int
    overrun: int
    cleared: int

    def __init__(self, deliver: Callable[[bytes], object], seed: int | None) -> None:
        """*deliver* takes a frame that leaves; it may raise OSError."""
        self.deliver = deliver
        self.chance = random.Random(seed)
        self.seed = seed
        self.flight: deque[Item] = deque()  # on the way to the bottleneck, by arrival
        self.queue: deque[Item] = deque()  # at the bottleneck; the first one is being sent
        self.last_arrival = self.free = self.begins = 0.0
        self.leaves = inf  # when the first in `queue` has been sent
        self.waiting_bytes = self.held_bytes = 0
        for name in self.COUNTED:
            setattr(self, name, 0)
        self.worst_lateness = self.recent_lateness = 0.0  # ever; since the counters were last read
        self.mean_delay = self.seconds_per_byte = 0.0
        self.limit: float = inf
        self.overhead = 0
        self.impaired = False
        self.sending: Schedule | Deliveries | None = None  # gives the rate
        self.changing: Schedule | Deliveries | None = None  # gives delay or loss
        # Bytes left of a packet from that time on, when conditions changed while it was sent.
        self.owed, self.owed_from = 0.0, inf
        self.codel: CoDel | None = None
        self.losing: Loss | None = None
        self.jitter: Jitter | None = None
        self.jitter_reorders = self.ecn = False
        self.duplicate = self.corrupt = self.reorder = 0.0

    def apply(self, conditions: Conditions, now: float) -> None:
        """Changes the conditions; what is being sent goes on at the new rate, what is under way arrives as it would have."""
        unsent = self._unsent(now) if self.queue else 0.0
        if conditions.seed is not None and conditions.seed != self.seed:
            self.seed = conditions.seed
            self.chance.seed(self.seed)
        self.mean_delay = conditions.delay_s
        self.losing = loss_of(conditions, self.chance)
        table = conditions.jitter_table
        self.jitter = Jitter(conditions.jitter_s, unpack(table), self.chance) if table else None
        self.jitter_reorders, self.ecn = conditions.jitter_reorders, conditions.ecn
        self.duplicate, self.corrupt = conditions.duplicate, conditions.corrupt
        self.reorder = conditions.reorder
        self.limit = inf if conditions.queue_bytes is None else conditions.queue_bytes
        codel = conditions.codel
        self.codel = CoDel(codel.target_s, codel.interval_s, conditions.mtu) if codel else None
        schedule = conditions.schedule
        chances = (self.losing, self.jitter, self.duplicate, self.corrupt, self.reorder, schedule)
        self.impaired = any(chances)
        before = (self.seconds_per_byte, self.overhead, self.sending)
        self.seconds_per_byte, self.overhead = 8 / (conditions.rate_bps or inf), conditions.overhead_bytes
        gives_rate = schedule is not None and (schedule.opportunity_bytes or schedule.rates is not None)
        self.sending = schedule if gives_rate else None
        self.changing = schedule if schedule is not None and (schedule.delays or schedule.losses) else None
        if unsent and before != (self.seconds_per_byte, self.overhead, self.sending):
            self.begins = self.owed_from = max(now, self.begins)
            self.owed = unsent
            self.leaves = self._finish(self.begins, unsent)

    @property
    def under_way(self) -> int:
        """Packets that have entered and not left."""
        return sum(item[3] for items in (self.flight, self.queue) for item in items)

    def clear(self) -> None:
        """Drops what is under way, and forgets it: what enters next keeps no order with it and waits for none of it."""
        self.cleared += self.under_way
        self.flight.clear()
        self.queue.clear()
        self.last_arrival = self.free = self.begins = self.owed = 0.0
        self.leaves = self.owed_from = inf
        self.waiting_bytes = self.held_bytes = 0

    def _unsent(self, now: float) -> float:
        """Bytes of the first in the queue that are still to be sent."""
        _, _, size, count = self.queue[0]
        left = self.owed if self.begins == self.owed_from else size + count * self.overhead
        if now <= self.begins:
            return left
        if self.sending is not None:
            return max(0.0, left - self.sending.capacity(self.begins, now))
        duration = self.leaves - self.begins
        return left * max(0.0, (self.leaves - now) / duration) if duration > 0 else 0.0

    def _finish(self, begins: float, size: float) -> float:
        """When *size* bytes have been sent that begin then."""
        if self.sending is not None:
            return self.sending.finish(begins, size)
        return begins + size * self.seconds_per_byte

    def enter(self, frame: bytes, now: float) -> None:
        """A frame has come in, at *now*."""
        size, count = len(frame) - HEADERS, 1
        if frame[1]:
            size, count = packet.measure(frame)
        self.packets += count
        self.entered_bytes += size
        if not self.impaired:
            self._travel(now, now + self.mean_delay, frame, size, count)
            return
        for piece in packet.split(frame) if count > 1 else (frame,):
            self._impair(piece, now, self.duplicate)

    def _impair(self, frame: bytes, now: float, duplicate: float) -> None:
        """One packet through what chance has in store for it; tc-netem(8) does the same in the same order."""
        chance = self.chance.random
        copies = 1
        if duplicate and chance() < duplicate:
            copies = 2
            self.duplicated += 1
        if self._lost(now):
            marked = packet.mark_congestion(frame) if self.ecn else None
            if marked is None:
                copies -= 1
                self.dropped_loss += 1
            else:
                frame = marked
                self.marked += 1
        if copies == 2:
            self._impair(frame, now, 0.0)
        if not copies:
            return
        if self.corrupt and chance() < self.corrupt:
            frame = packet.corrupt(frame, self.chance.getrandbits(32))
            self.corrupted += 1
        size = len(frame) - HEADERS
        if self.reorder and chance() < self.reorder:
            self.reordered += 1
            self._overtake((now, frame, size, 1))
            return
        delay = self.changing.delay_at(now) if self.changing is not None else None
        arrival = now + (self.mean_delay if delay is None else delay)
        if self.jitter is not None:
            arrival = max(now, arrival + self.jitter.deviation())
            if self.jitter_reorders:
                self._overtake((arrival, frame, size, 1))
                return
        self._travel(now, arrival, frame, size, 1)

    def _lost(self, now: float) -> bool:
        if self.changing is not None:
            probability = self.changing.loss_at(now)
            if probability is not None:
                return Independent(probability, self.chance).lost()
        return self.losing is not None and self.losing.lost()

    def _travel(self, now: float, arrival: float, frame: bytes, size: int, count: int) -> None:
        if self.held_bytes > MAX_HELD_BYTES:
            self.overrun += count
            return
        if arrival < self.last_arrival:
            arrival = self.last_arrival  # packets keep their order
        self.last_arrival = arrival
        self.held_bytes += size
        if self.queue:
            self.flight.append((arrival, frame, size, count))
            if self.sending is not None and self.leaves > now:
                # In an outage nothing leaves for long: what finds the queue full must not pile up here.
                self._arrive(now)
        else:
            self._begin((arrival, frame, size, count))

    def _overtake(self, item: Item) -> None:
        """A packet that may arrive before those that entered before it."""
        if self.held_bytes > MAX_HELD_BYTES:
            self.overrun += 1
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
        if self.sending is None:
            self.leaves = begins + (size + count * self.overhead) * self.seconds_per_byte
        else:
            self.leaves = self.sending.finish(begins, size + count * self.overhead)

    def advance(self, now: float) -> None:
        """Everything that happens up to *now*, in the order in which it happens. `leaves` says when there is more to do."""
        queue = self.queue
        while self.leaves <= now:
            self._arrive(self.leaves)  # these find the first in the queue still being sent
            item = queue.popleft()
            self.free = logical = self.leaves
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
        queue = self.queue
        while queue:
            item = queue[0]
            if self.codel is not None and self.codel.condemns(now - item[0], now, self.waiting_bytes):
                marked = packet.mark_congestion(item[1]) if self.ecn else None
                if marked is None:
                    queue.popleft()
                    self.waiting_bytes -= item[2]
                    self.held_bytes -= item[2]
                    self.dropped_aqm += item[3]
                    continue
                self.marked += item[3]
                queue[0] = item = (item[0], marked, item[2], item[3])
            self.waiting_bytes -= item[2]
            self.begins = now
            size = item[2] + item[3] * self.overhead
            self.leaves = self._finish(now, size)
            return
        if self.flight:
            self._begin(self.flight.popleft())
        else:
            self.leaves = inf

    def _wait(self, item: Item) -> None:
        """A packet has arrived at the bottleneck while another is being sent."""
        arrival, frame, size, count = item
        if self.waiting_bytes + size <= self.limit:
            self.waiting_bytes += size
            self.queue.append(item)
            return
        # Of a super-packet, what there is room for.
        fits = int((self.limit - self.waiting_bytes) // (size / count))
        if count > 1 and fits > 0:
            frame = packet.cut(frame, 0, fits)
            kept = packet.measure(frame)[0] if fits > 1 else len(frame) - HEADERS
            self.waiting_bytes += kept
            self.queue.append((arrival, frame, kept, fits))
            size, count = size - kept, count - fits
        self.dropped_queue += count
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
            self.overrun += count
        else:
            self.delivered += count

    def counters(self) -> dict[str, float]:
        """See `testbed.net.emulators.Counters`. What is recent begins anew."""
        counted = {name: getattr(self, name) for name in self.COUNTED}
        counted["bytes"] = counted.pop("entered_bytes")
        recent, self.recent_lateness = self.recent_lateness, 0.0
        self.worst_lateness = max(self.worst_lateness, recent)
        return counted | {"worst_lateness_s": self.worst_lateness, "recent_lateness_s": recent}
