"""The relay process: takes frames from one port, keeps each until its logical departure time, sends it through the other.

One process serves one link or many, both ways. userspace.py starts it as a program of its own (`testbed.programs`), with
open file descriptors and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Mapping
from math import inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from testbed import descriptors
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.control import Control, be_punctual, take_orders
from testbed.net.emulators.relay.line import Line, Stage
from testbed.net.emulators.relay.port import BATCH, Port, Receiver
from testbed.net.profile.schedule import unpack

if TYPE_CHECKING:
    from testbed.net.emulators.relay.cell.cell import Cell
    from testbed.net.sharing.contract import Scheduler

NOBODY = 65534
COALESCE_S = 120e-6  # no two wake-ups closer than this: waking is what costs most, and a busy link would have two a packet
REST = 0.15  # of the time since it woke, at least: the kernel stops a real-time process that never sleeps, for 50 ms a second
SPIN_S = 30e-6  # below this, waiting in select(2) costs more precision than polling costs processor
MANY = 1000  # packets under way
IDLE_S = 1.0  # how often an idle relay looks whether its parent still lives


class RelayedLink:
    """Both directions between two ports; in a *cell*, given by direction, as one of its users."""

    def __init__(
        self, port_a: Port, port_b: Port, seed: int | None, cell: Mapping[str, Cell] | None = None
    ) -> None:
        self.ports, self.cell = (port_a, port_b), cell
        seeds = (None, None) if seed is None else (2 * seed, 2 * seed + 1)
        self.lines = {
            way: Line(port.send, seed) if cell is None else cell[way].join(port.send, seed)
            for way, port, seed in zip(("up", "down"), (port_b, port_a), seeds, strict=True)
        }

    def apply(self, conditions: dict[str, dict[str, Any]], files: list[int], fresh: bool = False) -> None:
        """New conditions for both ways, without what is under way if they are to begin *fresh*; *files*: descriptors of what
        schedules are packed in. They are closed."""
        for way, line in self.lines.items():
            values = dict(conditions[way])
            packed = values.pop("schedule", None)
            schedule = None if packed is None else unpack(packed, files[packed["file"]])
            now = monotonic()
            line.advance(now)
            if fresh:
                line.clear()
            line.apply(Conditions.from_plain(values, schedule), now)
        for file in files:
            os.close(file)

    def counters(self) -> dict[str, dict[str, float]]:
        """Each way's; what the kernel had no room for in front of it is an overrun."""
        answer = {}
        for (way, line), port in zip(self.lines.items(), self.ports, strict=True):
            counted = line.counters()
            answer[way] = counted | {"overrun": counted["overrun"] + port.count_lost()}
        return answer


class Relay:
    """The links that this process serves, by name."""

    def __init__(self) -> None:
        self._links: dict[str, RelayedLink] = {}
        self._ports: dict[int, tuple[Port, Line]] = {}  # by descriptor: the port, and where its frames go
        self._busy: set[Stage] = set()  # with something under way

    def add(self, name: str, link: RelayedLink) -> None:
        """One more link."""
        self._links[name] = link
        for port, line in zip(link.ports, link.lines.values(), strict=True):
            self._ports[port.fileno] = (port, line)

    def remove(self, link: str) -> bool:
        """Ends a link, and what is under way on it is lost; whether another one is left."""
        removed = self._links.pop(link)
        for port, line in zip(removed.ports, removed.lines.values(), strict=True):
            del self._ports[port.fileno]
            self._busy.discard(line)
            line.leave()
            port.close()
        return bool(self._links)

    def apply(
        self, link: str, conditions: dict[str, dict[str, Any]], files: list[int], fresh: bool = False
    ) -> None:
        """Changes the conditions of a link; see `RelayedLink.apply`."""
        changed = self._links[link]
        changed.apply(conditions, files, fresh)
        self._busy.update(line.stage for line in changed.lines.values() if line.stage.leaves < inf)

    def hurry(self, link: str) -> None:
        """Lets a link carry at once what it carries, see `Line.hurry`."""
        now = monotonic()
        for line in self._links[link].lines.values():
            line.hurry(now)

    def under_way(self, link: str) -> int:
        """Packets on a link, both ways."""
        return sum(line.under_way for line in self._links[link].lines.values())

    def counters(self, link: str) -> dict[str, dict[str, float]]:
        """A link's, see `RelayedLink.counters`."""
        return self._links[link].counters()

    def share(self, link: str, scheduler: str) -> None:
        """Has the cell of a link be shared out by another scheduler, from now on."""
        kind, now = _scheduler(scheduler), monotonic()
        for cell in (self._links[link].cell or {}).values():
            cell.follow(kind, now)

    def close(self) -> None:
        """Closes all ports at the same time: with each the kernel waits until no processor uses it any more (some ten
        milliseconds), a wait that hundreds of them can share."""
        closing = [threading.Thread(target=port.close) for port, _ in self._ports.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def serve(self, control: Control) -> None:
        """Until *control* says to stop."""
        busy, ports, waiter, receive = self._busy, self._ports, Waiter(), Receiver().receive
        files = [*ports, *control.files]
        woken = checked = monotonic()
        more = False
        while not control.stopped:
            now = monotonic()
            if not more:
                worked = now - woken
                sleep(max(COALESCE_S - worked, REST * worked))
                now = monotonic()
            due = inf
            for stage in busy:
                if stage.leaves < due:
                    due = stage.leaves
            wait = due - now
            if wait > IDLE_S:
                wait = IDLE_S
            elif wait < SPIN_S or more:
                wait = 0.0
            ready = waiter.wait(files, wait)
            woken = now = monotonic()
            more, called = False, now - checked > IDLE_S
            for descriptor in ready:
                if descriptor not in ports:
                    called = True
                    continue
                port, line = ports[descriptor]
                frames = receive(port)
                more |= len(frames) == BATCH  # there may be more
                enter = line.enter
                for arrived, frame in frames:
                    enter(frame, arrived)
                busy.add(line.stage)
            for stage in tuple(busy):
                # Not only when something leaves: during an outage the queue has to fill, and then overflow.
                if stage.leaves <= now or len(stage.flight) > MANY:
                    stage.advance(now)
                if stage.leaves == inf and not stage.queue:
                    busy.discard(stage)
            if called:
                checked = now
                control.serve(ready, self)
                files = [*ports, *control.files]


class Waiter:
    """select(2) while there are few descriptors, all of which it takes: precise to the microsecond, at a fifth of the cost of any
    other way that is. Else an epoll that holds them all, and is waited for as precisely: select's own cost grows with their
    number, it takes none from 1,024 on, and epoll_wait(2) knows only milliseconds from here."""

    FEW = 16
    _SELECTED = 1024  #: FD_SETSIZE

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._held: list[int] = []

    def wait(self, files: list[int], wait: float) -> list[int]:
        """Those of *files* that can be read, after at most *wait* seconds."""
        if files is not self._held and files != self._held:
            self._hold(files)
        if self._epoll is None:
            return select.select(files, [], [], wait)[0]
        descriptors.ready([self._epoll], wait)
        return [file for file, _ in self._epoll.poll(0)]

    def _hold(self, files: list[int]) -> None:
        if self._epoll is not None:
            self._epoll.close()
        self._epoll, self._held = None, files
        if len(files) > self.FEW or max(files, default=0) >= self._SELECTED:
            self._epoll = select.epoll()
            for file in files:
                self._epoll.register(file, select.EPOLLIN)


def _drop_privileges() -> None:
    """Open file descriptors are all that it needs from here on."""
    if (
        os.geteuid() == 0 and "TESTBED_ROOTLESS" not in os.environ
    ):  # there, root is whoever called, and nobody is nobody
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


class _Stopped(Exception):
    """SIGTERM came."""


def _stop(number: int, frame: object) -> None:
    """Ends serving, not the process: ports close together (see `Relay.close`), and a killed process's one by one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def _scheduler(text: str) -> Scheduler:
    from testbed.kinds import parse
    from testbed.net.sharing import SCHEDULERS

    scheduler: Scheduler = parse(text, SCHEDULERS, "scheduler")
    return scheduler


def _cell(cells: dict[str, dict[str, Cell]], wanted: dict[str, str]) -> dict[str, Cell]:
    """Both directions of the cell of that name, made where it is not among *cells* yet."""
    if wanted["name"] not in cells:
        from testbed.net.emulators.relay.cell.cell import Cell

        scheduler = _scheduler(wanted["scheduler"])
        cells[wanted["name"]] = {way: Cell(scheduler) for way in ("up", "down")}
    return cells[wanted["name"]]


def main() -> None:
    """Serves links; the only argument is a file descriptor with JSON in it (see `serving.start`)."""
    control, links = take_orders()
    relay = Relay()
    cells: dict[str, dict[str, Cell]] = {}
    for name, order in links.items():
        cell = _cell(cells, order["cell"]) if "cell" in order else None
        link = RelayedLink(Port(order["port_a"]), Port(order["port_b"]), order["seed"], cell)
        link.apply(order["conditions"], order.get("files", []))
        relay.add(name, link)
    be_punctual()
    _drop_privileges()
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(_Stopped):
        relay.serve(control)
    relay.close()
