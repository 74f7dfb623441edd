"""The process that makes netem follow traces: it changes a link's queueing disciplines in place, every few milliseconds.

    outer netem ◀── delay, loss (when they change)          token bucket ◀── rate          plug ◀── hold or go on

It runs inside the wire's namespace, as a program of its own that imports the standard library and this package's own parts alone,
and ends with the network: with the other end of its control socket, with its parent, or with the namespace's last process.

A step that comes late jumps to what the trace says now. How late is counted, as the relay counts its packets' lateness.

A change fills the token bucket: it gives away a packet's worth each time, and what was saved for the packet at the head of the
queue is forgotten. So the bytes that left are counted, and a step asks for what the trace has had for them since the beginning,
no more and no less: errors do not add up. What a link could have carried while nothing waited is gone, as it is on any link.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any

from testbed import descriptors
from testbed.net.emulators.netem.qdiscs import ETHERNET_HEADER, HOLD, RELEASE, SLACK_S, Plug, TokenBucket
from testbed.net.emulators.relay.control import Control, be_punctual, take_orders
from testbed.net.netlink import TCA_KIND, TCA_OPTIONS, Netlink, attribute, text
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.schedule import Schedule, unpack

MOST_BYTES_PER_S = 10**11  # "no limit"
_LEAST_BYTES_PER_S = 125  # a kilobit per second: what the bucket gives beyond its one filling does not count
_MEMORY_STEPS = 12  # at most so much of what a bottleneck is behind with is made up for


@dataclass(frozen=True)
class Pace:
    """What a bottleneck does until the next step: hold everything, or a bucket of so many bytes at this rate."""

    hold: bool
    rate_bytes_per_s: int
    burst_bytes: int


class Pacer:
    """One direction's. Times in seconds, on the schedule's clock; bytes as the bottleneck counts them."""

    def __init__(self, schedule: Schedule | Deliveries, mtu: int, now: float, delivered: int) -> None:
        self._schedule, self._mtu = schedule, mtu
        self._now, self._delivered = now, delivered
        self._behind = 0.0  # bytes that the trace had for what waited, and did not leave; below 0: sent ahead
        self._idle = True

    def step(self, now: float, until: float, delivered: int, waiting: int) -> Pace:
        """The pace from *now* to *until*. *delivered*: bytes that have left, ever; *waiting*: bytes in the queue."""
        had = self._schedule.capacity(self._now, now)
        coming = self._schedule.capacity(now, until)
        self._behind += had - (delivered - self._delivered)
        self._behind = min(self._behind, self._allowed(had, coming, waiting))
        self._now, self._delivered, self._idle = now, delivered, waiting == 0
        if coming == 0:
            return Pace(True, _LEAST_BYTES_PER_S, self._mtu + ETHERNET_HEADER)
        if coming == inf:
            return Pace(False, MOST_BYTES_PER_S, 1 << 20)
        burst = self._mtu + ETHERNET_HEADER + round(coming / (until - now) * SLACK_S)
        wanted = self._behind + coming
        rate = round((wanted - (burst if waiting else 0)) / (until - now))
        rate = min(MOST_BYTES_PER_S, max(_LEAST_BYTES_PER_S, rate))
        return Pace(self._holds(wanted, coming, waiting), rate, burst)

    def _allowed(self, had: float, coming: float, waiting: int) -> float:
        """How far behind one may be: not at all where nothing waited, by no more than a packet where it has just begun to."""
        if inf in (had, coming) or waiting == 0:
            return 0.0
        if self._idle:
            return float(self._mtu)
        return max(2.0 * self._mtu, _MEMORY_STEPS * max(had, coming), self._behind if coming == 0 else 0.0)

    def _holds(self, wanted: float, coming: float, waiting: int) -> bool:
        """Whether nothing may leave in this step. Where a packet takes many steps it has to wait for its own time, too; else one
        that finds the bottleneck idle may leave at once, and what follows waits for it."""
        if waiting:
            return wanted < min(self._mtu, waiting)
        return wanted <= 0 or coming * 4 < self._mtu


STEP_S = 8e-3
"""From one step to the next. They must not be further apart than 10 ms, and no step is on time to the microsecond."""
_CLOSEST_S = 1e-3  # in less time, a rate means nothing
_LOOK_S = 1.0  # how often an idle process looks whether its parent still lives
_LATENCY64, _NS_PER_TICK, _FULL = 10, 64, 0xFFFFFFFF
_QOPT_BYTES = 24  # struct tc_netem_qopt, in front of netem's attributes


class Way:
    """One direction under a trace."""

    def __init__(self, orders: dict[str, Any], schedule: Schedule | Deliveries, netlink: Netlink) -> None:
        self.schedule, self._netlink = schedule, netlink
        self._ifindex, self._plug_bytes = orders["ifindex"], orders["plug_bytes"]
        self._outer_handle, self._bucket_handle, self._plug_handle, self._root = orders["handles"]
        self._outer = bytearray.fromhex(orders["outer"])
        self._stab = bytes.fromhex(orders["stab"])
        self._now: tuple[float | None, float | None] = (None, None)  # delay and loss that are in force
        self._held = False
        self._pace: Pace | None = None
        self._pacer: Pacer | None = None
        if schedule.gives_rate:
            self._pacer = Pacer(schedule, orders["mtu"], monotonic(), self._counted()[0])

    def until(self, now: float, latest: float) -> float:
        """When the next step is to be, no later than *latest*: in time for what a step cannot do ahead of time."""
        schedule = self.schedule
        if (
            schedule.rates is not None
            and schedule.rate_at(now) != 0
            and schedule.delays is schedule.losses is None
        ):
            return latest  # a rate's change within a step is part of the step's bytes; an outage must not end early
        if isinstance(schedule, Deliveries):
            return latest
        return max(now + _CLOSEST_S, min(latest, schedule.next_change(now)))

    def step(self, now: float, until: float) -> None:
        """Sets what holds from *now* to *until*. Raises NetworkError where the qdiscs are gone."""
        changes = []
        values = (self.schedule.delay_at(now), self.schedule.loss_at(now))
        if values != self._now:
            self._now = values
            changes.append(
                (self._outer_handle, self._root, _netem(patched(self._outer, *values), self._stab))
            )
        if self._pacer is not None:
            delivered, waiting = self._counted()
            pace = self._pacer.step(now, until, delivered, waiting)
            same, self._pace = pace == self._pace and not waiting, pace
            if not pace.hold and not same:
                bucket = TokenBucket(pace.rate_bytes_per_s, pace.burst_bytes)
                changes.append(
                    (self._bucket_handle, self._outer_handle + 1, _options("tbf", bucket.encode()))
                )
            if not same and not (pace.hold and self._held):
                plug = Plug(self._plug_bytes, HOLD if pace.hold else RELEASE)
                changes.append((self._plug_handle, self._bucket_handle + 1, _options("plug", plug.encode())))
            self._held = pace.hold
        if changes:
            self._netlink.change(self._ifindex, changes)

    def _counted(self) -> tuple[int, int]:
        """Bytes that have left the bucket, and bytes that wait in it."""
        bucket = self._netlink.qdisc(self._ifindex, self._bucket_handle)
        if bucket is None:
            return 0, 0
        sent = struct.unpack_from("=Q", bucket.stats.get(1, bytes(8)))[0]
        return sent, struct.unpack_from("=II", bucket.stats.get(3, bytes(8)))[1]


def patched(outer: bytearray, delay_s: float | None, loss: float | None) -> bytes:
    """Netem's encoded options (`options.Options.encode`) with another delay and loss; None: as they are."""
    options = bytearray(outer)
    if delay_s is not None:
        delay_ns, at = round(delay_s * 1e9), _QOPT_BYTES
        struct.pack_into("=I", options, 0, min(delay_ns // _NS_PER_TICK, _FULL))
        while struct.unpack_from("=H", options, at + 2)[0] != _LATENCY64:
            at += (struct.unpack_from("=H", options, at)[0] + 3) & ~3
        struct.pack_into("=q", options, at + 4, delay_ns)
    if loss is not None:
        struct.pack_into("=I", options, 8, round(loss * _FULL))
    return bytes(options)


def _options(kind: str, encoded: bytes) -> bytes:
    return text(TCA_KIND, kind) + attribute(TCA_OPTIONS, encoded)


def _netem(encoded: bytes, stab: bytes) -> bytes:
    return _options("netem", encoded) + stab


class Follower:
    """One link whose ways follow traces, or do not for the time being."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        self._ways: dict[str, Way] = {}
        self._lateness = {way: [0.0, 0.0] for way in ("up", "down")}  # the worst ever; since it was asked for
        self.due = 0.0

    def apply(self, link: str, conditions: dict[str, Any], files: list[int], fresh: bool = False) -> None:
        """From now on these ways follow these traces, and no others. The files are closed."""
        self._ways = {}
        for way, orders in conditions.items():
            packed = orders["schedule"]
            self._ways[way] = Way(orders, unpack(packed, files[packed["file"]]), self._netlink)
        for file in files:
            os.close(file)
        self.due = monotonic()
        self.step(self.due)

    def hurry(self, link: str) -> None:
        """Nobody asks it to."""

    def under_way(self, link: str) -> int:
        """The queueing disciplines hold the packets, not this process."""
        return 0

    def counters(self, link: str) -> dict[str, dict[str, float]]:
        """How late steps were, each way: ``worst_lateness_s`` and ``recent_lateness_s``."""
        answer = {}
        for way, (worst, recent) in self._lateness.items():
            self._lateness[way] = [max(worst, recent), 0.0]
            answer[way] = {"worst_lateness_s": max(worst, recent), "recent_lateness_s": recent}
        return answer

    def share(self, link: str, scheduler: str) -> None:
        """Qdiscs are of one link each."""
        raise LookupError(f"{link} is in no cell")

    def remove(self, link: str) -> bool:
        """There is but one link."""
        return False

    def wait_s(self, now: float) -> float:
        """How long until there is something to do."""
        return max(0.0, self.due - now) if self._ways else _LOOK_S

    def step(self, now: float) -> None:
        """Every way's step. The next one is due a step after this one was, after what was missed, or sooner for a change."""
        if not self._ways:
            return
        late = now - self.due
        self.due += STEP_S * (1 + max(0.0, late) // STEP_S)
        if self.due - now < _CLOSEST_S:
            self.due += STEP_S
        self.due = min(followed.until(now, self.due) for followed in self._ways.values())
        for way, followed in self._ways.items():
            followed.step(now, self.due)
            self._lateness[way][1] = max(self._lateness[way][1], late)

    def serve(self, control: Control) -> None:
        """Until *control* says to stop, or the qdiscs are gone."""
        looked = monotonic()
        while not control.stopped:
            ready = descriptors.ready(control.files, self.wait_s(monotonic()))
            now = monotonic()
            if self._ways and now >= self.due:
                self.step(now)
            if ready or now - looked > _LOOK_S:
                looked = now
                control.serve(ready, self)


def main() -> None:
    """Follows a link's traces; the only argument is a file descriptor with JSON in it (see `serving.start`)."""
    control, _ = take_orders()
    be_punctual()
    with Netlink.here() as netlink:  # which takes the right to administer the network: it stays root
        Follower(netlink).serve(control)
