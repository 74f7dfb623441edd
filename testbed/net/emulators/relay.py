"""The relay process: reads frames from one TAP, keeps each until its logical departure time, writes it to the other.

One process serves one link or many, both ways. It is started by userspace.py as a program of its own, with open file descriptors
and nothing else, and imports the standard library alone: it is there in some twenty milliseconds.

Every time is *logical*: a packet's arrival at the bottleneck and its departure follow from the times of the packets before it and
the profile, never from when this process got to run. Running late delays the packets concerned and is counted, but is not handed
on to the next ones, so a saturated link delivers its rate exactly.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import random
import select
import socket
import sys
from collections import deque
from collections.abc import Callable
from math import inf
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType
from typing import Any

PRIORITY = 2  # real-time, just above the probers' (probe.py), which must not hold up the link they measure
ETHERNET_HEADER = 14  # rates and queues count what is behind it
NOBODY = 65534
BATCH = 64  # frames read from one TAP before the departures get their turn
COALESCE_S = 300e-6  # no two wake-ups closer than this: waking is what costs most, and a busy link would have two a packet
LATE_S = 0.5e-3  # waking this much after the time asked for means that the processor was elsewhere
SPIN_S = 30e-6  # below this, waiting in select(2) costs more precision than polling costs processor
IDLE_S = 1.0  # how often an idle relay looks whether its parent still lives
MAX_HELD_BYTES = (
    256 << 20
)  # under way in one direction: a sender faster than the host's memory is no reason to end


MAX_FILES = 2  # a schedule each way


def _beside(name: str) -> ModuleType:
    """A module that lies in this file's directory: this process knows no packages."""
    place = Path(__file__).resolve().with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"relay_{name}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_schedules = _beside("schedule")


class Line:
    """One direction. Times are seconds of CLOCK_MONOTONIC."""

    __slots__ = (
        "begins",
        "bytes",
        "chance",
        "changing",
        "deliver",
        "delivered",
        "dropped_loss",
        "dropped_queue",
        "flight",
        "free",
        "held_bytes",
        "last_arrival",
        "leaves",
        "limit",
        "mean_delay",
        "overrun",
        "owed",
        "owed_from",
        "packets",
        "probability",
        "queue",
        "seconds_per_byte",
        "sending",
        "spread",
        "waiting_bytes",
        "worst_lateness",
    )

    def __init__(self, deliver: Callable[[bytes], object], seed: int | None) -> None:
        """*deliver* takes a frame that leaves; it may raise OSError."""
        self.deliver = deliver
        self.chance = random.Random(seed)
        self.flight: deque[tuple[float, bytes]] = (
            deque()
        )  # on the way to the bottleneck, with arrival times there
        self.queue: deque[bytes] = deque()  # at the bottleneck; the first one is being sent
        self.last_arrival = self.free = 0.0
        self.begins = 0.0
        self.leaves = inf  # when the first in `queue` has been sent
        self.waiting_bytes = self.held_bytes = 0
        self.packets = self.bytes = self.delivered = self.dropped_loss = self.dropped_queue = self.overrun = 0
        self.worst_lateness = 0.0
        self.probability = self.mean_delay = self.spread = self.seconds_per_byte = 0.0
        self.limit: float = inf
        self.sending: Any = None  # a schedule (schedule.py) that gives the rate
        self.changing: Any = None  # one that gives delay or loss
        self.owed, self.owed_from = (
            0.0,
            inf,
        )  # bytes left of a packet from that time on, when conditions changed while it was sent

    def apply(self, conditions: dict[str, Any], now: float) -> None:
        """Changes the conditions; what is being sent goes on at the new rate, what is under way arrives as it would have.

        ``schedule``, where it is there, gives what changes over time.
        """
        unsent = self._unsent(now) if self.queue else 0.0
        self.probability = conditions["loss"]
        self.mean_delay = conditions["delay_s"]
        self.spread = conditions["jitter_s"]
        self.limit = inf if conditions["queue_bytes"] is None else conditions["queue_bytes"]
        before = self.seconds_per_byte, self.sending
        self.seconds_per_byte = 8 / (conditions["rate_bps"] or inf)
        schedule = conditions.get("schedule")
        gives_rate = schedule is not None and (schedule.opportunity_bytes or schedule.rates is not None)
        self.sending = schedule if gives_rate else None
        self.changing = schedule if schedule is not None and (schedule.delays or schedule.losses) else None
        if unsent and before != (self.seconds_per_byte, self.sending):
            self.begins = self.owed_from = max(now, self.begins)
            self.owed = unsent
            self.leaves = self._finish(self.begins, unsent)

    def _unsent(self, now: float) -> float:
        """Bytes of the first in the queue that are still to be sent."""
        size = self.owed if self.begins == self.owed_from else len(self.queue[0]) - ETHERNET_HEADER
        if now <= self.begins:
            return size
        if self.sending is not None:
            return max(0.0, size - self.sending.capacity(self.begins, now))
        return (
            size * max(0.0, (self.leaves - now) / (self.leaves - self.begins))
            if self.leaves > self.begins
            else 0.0
        )

    def _finish(self, begins: float, size: float) -> float:
        if self.sending is not None:
            return self.sending.finish(begins, size)
        return begins + size * self.seconds_per_byte

    def enter(self, frame: bytes, now: float) -> None:
        """A frame has come in."""
        size = len(frame) - ETHERNET_HEADER
        self.packets += 1
        self.bytes += size
        if self.changing is not None:
            self._look_up(now)
        if self.probability and self.chance.random() < self.probability:
            self.dropped_loss += 1
            return
        if self.held_bytes > MAX_HELD_BYTES:
            self.overrun += 1
            return
        arrival = now + self.mean_delay
        if self.spread:
            arrival = max(now, self.chance.gauss(arrival, self.spread))
        if arrival < self.last_arrival:
            arrival = self.last_arrival  # packets keep their order
        self.last_arrival = arrival
        self.held_bytes += size
        if self.queue:
            self.flight.append((arrival, frame))
            if self.sending is not None and self.leaves > now:
                self._arrive(
                    now
                )  # in an outage nothing leaves for long: what finds the queue full must not pile up here
        else:
            self._begin(frame, arrival)

    def _look_up(self, now: float) -> None:
        loss, delay = self.changing.loss_at(now), self.changing.delay_at(now)
        self.probability = self.probability if loss is None else loss
        self.mean_delay = self.mean_delay if delay is None else delay

    def _begin(self, frame: bytes, arrival: float) -> None:
        # Nothing is in front of it, so when it will have been sent is known before it arrives: one event less.
        self.queue.append(frame)
        self.begins = arrival if arrival > self.free else self.free
        self.leaves = self._finish(self.begins, len(frame) - ETHERNET_HEADER)

    def _arrive(self, before: float) -> None:
        """What has reached the bottleneck before this time takes its place in the queue, or finds it full."""
        flight, queue = self.flight, self.queue
        while flight and flight[0][0] < before:
            size = len(flight[0][1]) - ETHERNET_HEADER
            if self.waiting_bytes + size > self.limit:
                self.dropped_queue += 1
                self.held_bytes -= size
                flight.popleft()
            else:
                self.waiting_bytes += size
                queue.append(flight.popleft()[1])

    def advance(self, now: float) -> None:
        """Everything that happens up to *now*, in the order in which it happens. `leaves` says when there is more to do."""
        flight, queue = self.flight, self.queue
        while self.leaves <= now:
            self._arrive(self.leaves)  # these find the first in the queue still being sent
            frame = queue.popleft()
            self.free = logical = self.leaves
            if queue:
                size = len(queue[0]) - ETHERNET_HEADER
                self.waiting_bytes -= size
                self.begins = self.free
                self.leaves = self._finish(self.free, size)
            elif flight:
                arrival, following = flight.popleft()
                self._begin(following, arrival)
            else:
                self.leaves = inf
            self._leave(frame, logical)

    def _leave(self, frame: bytes, logical: float) -> None:
        self.held_bytes -= len(frame) - ETHERNET_HEADER
        lateness = monotonic() - logical
        if lateness > self.worst_lateness:
            self.worst_lateness = lateness
        try:
            self.deliver(frame)
        except OSError:  # the interface is down or gone
            self.overrun += 1
        else:
            self.delivered += 1

    def counters(self) -> dict[str, float]:
        return {
            "packets": self.packets,
            "bytes": self.bytes,
            "dropped_loss": self.dropped_loss,
            "dropped_queue": self.dropped_queue,
            "worst_lateness_s": self.worst_lateness,
            "delivered": self.delivered,
            "overrun": self.overrun,
        }


class Pair:
    """Both directions between two file descriptors."""

    def __init__(self, tap_a: int, tap_b: int, frame_bytes: int, seed: int | None) -> None:
        """Frames up to *frame_bytes* long."""
        self.frame_bytes = frame_bytes
        seeds = (None, None) if seed is None else (2 * seed, 2 * seed + 1)
        self.lines = {
            "up": Line(lambda frame: os.write(tap_b, frame), seeds[0]),
            "down": Line(lambda frame: os.write(tap_a, frame), seeds[1]),
        }
        self.taps = ((tap_a, self.lines["up"]), (tap_b, self.lines["down"]))

    def apply(self, conditions: dict[str, dict[str, Any]], files: list[int]) -> None:
        """*files*: descriptors of what schedules are packed in; they are closed."""
        for way, line in self.lines.items():
            packed = conditions[way].get("schedule")
            schedule = None if packed is None else _schedules.unpack(packed, files[packed["file"]])
            line.advance(monotonic())
            line.apply(conditions[way] | {"schedule": schedule}, monotonic())
        for file in files:
            os.close(file)


class Relay:
    """The links that this process serves, by name."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pair] = {}
        self._taps: dict[
            int, tuple[Line, int]
        ] = {}  # descriptor -> where its frames go, and how long they may be
        self._busy: set[Line] = set()  # with something under way

    def add(self, name: str, pair: Pair) -> None:
        """One more link."""
        self.pairs[name] = pair
        self._taps.update({tap: (line, pair.frame_bytes) for tap, line in pair.taps})

    def remove(self, name: str) -> None:
        """Ends a link: its TAPs are closed, and what is under way on it is lost."""
        for tap, line in self.pairs.pop(name).taps:
            del self._taps[tap]
            self._busy.discard(line)
            os.close(tap)

    def apply(self, name: str, conditions: dict[str, dict[str, Any]], files: list[int]) -> None:
        """Changes the conditions of a link; see `Pair.apply`."""
        pair = self.pairs[name]
        pair.apply(conditions, files)
        self._busy.update(line for line in pair.lines.values() if line.leaves < inf)

    def serve(self, control: Control) -> None:
        """Until *control* says to stop."""
        busy, taps, waiter = self._busy, self._taps, Waiter()
        files = [*taps, *control.files]
        woken = 0.0
        while not control.stopped:
            now = monotonic()
            if now - woken < COALESCE_S:
                sleep(COALESCE_S - (now - woken))
                now = monotonic()
            due = inf
            for line in busy:
                if line.leaves < due:
                    due = line.leaves
            wait = due - now
            if wait > IDLE_S:
                wait = IDLE_S
            elif wait < SPIN_S:
                wait = 0.0
            ready = waiter.wait(files, wait)
            woken = monotonic()
            called = wait == IDLE_S
            for descriptor in ready:
                if descriptor in taps:
                    line, frame_bytes = taps[descriptor]
                    self._receive(descriptor, line, frame_bytes, due, woken)
                    busy.add(line)
                else:
                    called = True
            now = monotonic()
            for line in tuple(busy):
                if line.leaves <= now:
                    line.advance(now)
                if line.leaves == inf:
                    busy.discard(line)
            if called:
                control.serve(ready, self)
                files = [*taps, *control.files]

    def _receive(self, tap: int, line: Line, frame_bytes: int, due: float, now: float) -> None:
        """Takes in what waits at *tap*, read at *now*; something else had been due at *due*."""
        frames: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while len(frames) < BATCH:
                frames.append(os.read(tap, frame_bytes))
        late = now - due
        if late > LATE_S and len(frames) > 1:
            # This process did not get to run for a while. When these came in meanwhile is not known, but not all of them now:
            # that would be a gap and a burst that the sender never made. Evenly spread is the best guess, and keeps the rate.
            step = late / len(frames)
            for number, frame in enumerate(frames):
                line.enter(frame, due + (number + 1) * step)
            return
        for frame in frames:
            line.enter(frame, now)


class Waiter:
    """select(2), which is precise to the microsecond. Where there are many descriptors, on an epoll that holds them all: select's
    own cost grows with their number, and epoll_wait(2) knows only milliseconds from here."""

    FEW = 16

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._held: list[int] = []

    def wait(self, files: list[int], wait: float) -> list[int]:
        """Those of *files* that can be read, after at most *wait* seconds."""
        if len(files) <= self.FEW:
            return select.select(files, [], [], wait)[0]
        if self._epoll is None or (files is not self._held and files != self._held):
            if self._epoll is not None:
                self._epoll.close()
            self._epoll, self._held = select.epoll(), files
            for file in files:
                self._epoll.register(file, select.EPOLLIN)
        select.select([self._epoll], [], [], wait)
        return [file for file, _ in self._epoll.poll(0)]


class Control:
    """Orders from outside, one JSON message each: ``apply``, ``counters`` and ``remove`` for a ``link``, and ``stop``.

    Either over one socket pair, whose other end's closing ends the relay (as does the parent's death), or over a listening
    socket.
    """

    def __init__(self, sock: socket.socket, listening: bool) -> None:
        self._listener = sock if listening else None
        self._connections = [] if listening else [sock]
        self._parent = None if listening else os.getppid()
        self.stopped = False
        self.files = [sock.fileno()]

    def serve(self, ready: list[int], relay: Relay) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            self.stopped = True
        if self._listener is not None and self._listener.fileno() in ready:
            with contextlib.suppress(OSError):
                connection = self._listener.accept()[0]
                connection.settimeout(1)
                self._connections.append(connection)
        for connection in [c for c in self._connections if c.fileno() in ready]:
            try:
                message, files, _, _ = socket.recv_fds(connection, 65536, MAX_FILES)
                if not message:
                    raise ConnectionError
                connection.send(json.dumps(self._answer(json.loads(message), files, relay)).encode())
            except (OSError, ValueError, LookupError, TypeError):
                connection.close()
                self._connections.remove(connection)
                self.stopped |= self._listener is None
        self.files = [s.fileno() for s in (self._listener, *self._connections) if s is not None]

    def _answer(self, order: dict[str, Any], files: list[int], relay: Relay) -> dict[str, Any]:
        if order["do"] == "apply":
            relay.apply(order["link"], order["conditions"], files)
            return {}
        if order["do"] == "counters":
            return {way: line.counters() for way, line in relay.pairs[order["link"]].lines.items()}
        if order["do"] == "remove":
            relay.remove(order["link"])
            self.stopped |= not relay.pairs
            return {}
        self.stopped |= order["do"] == "stop"
        return {}


def _ask_for_precision() -> None:
    """Real-time scheduling where permitted, else a better nice value, else nothing; and exact timers."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(-10)
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1")


def _drop_privileges() -> None:
    """Open file descriptors are all that it needs from here on."""
    if (
        os.geteuid() == 0 and "TESTBED_ROOTLESS" not in os.environ
    ):  # there, root is whoever called, and nobody is nobody
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def main() -> None:
    """Serves links; the only argument is a file descriptor with JSON in it (see `userspace._start`)."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        orders = json.loads(file.read())
    gc.disable()  # nothing here forms cycles, and a collection takes longer than a packet may wait
    control = Control(socket.socket(fileno=orders["control"]), orders["listening"])
    relay = Relay()
    for name, link in orders["links"].items():
        pair = Pair(link["tap_a"], link["tap_b"], link["frame_bytes"], link["seed"])
        pair.apply(link["conditions"], link.get("files", []))
        relay.add(name, pair)
    _ask_for_precision()
    _drop_privileges()
    relay.serve(control)


if __name__ == "__main__":
    main()
