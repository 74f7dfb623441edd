"""A topology, built: namespaces, links with conditions, and the way to take all of it away again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed import files
from testbed.errors import NetworkError
from testbed.hosts import host as hosts
from testbed.hosts import namespaces, processes
from testbed.identity import as_root
from testbed.net.fabric import removal, state
from testbed.net.fabric.state import State
from testbed.net.profile.profile import MTU, Profile
from testbed.net.topology.topology import Link, Topology

if TYPE_CHECKING:
    from testbed.hosts.host import Host, Process
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Attachment, Counters, Emulator

_LOOK_S, _QUIET_S = 2e-3, 10e-3  # what a packet brings about at the other end is sent within the latter
_SETTLING_S, _LONGEST_SETTLING_S = 0.1, 5.0
_STOPPED_S = 1.0  # a process that stands still for longer is given up


class Fabric:
    """A `Network` of namespaces that is there. Leaving its ``with`` block, or `close`, removes it.

    Make one with `build`. Threads of the caller are in the namespace they were in, always.
    """

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self._state: State | None = None
        self._attachments: list[Attachment] = []
        self._capturing: subprocess.Popen[bytes] | None = None
        self._mtus: dict[int, int] = {}  # link -> its own, where it ever had one
        self._super_packets: dict[int, dict[str, int]] = {}  # link -> what is allowed, where that is any
        self._watched: list[tuple[Process, str]] = []

    @classmethod
    def build(
        cls,
        topology: Topology,
        emulator: str | Emulator = "auto",
        *,
        run_id: str | None = None,
        persistent: bool = False,
        captures: Path | None = None,
        name: str = "",
    ) -> Fabric:
        """The topology, built, each link under its profile. Where anything fails, or is interrupted, nothing
        is left.

        `captures`: the directory for the packets of links with ``pcap: true``; None: that of the network's state, which goes
        with it. `persistent`: the network outlives this process, until `removal.down`. `name`: what it is called beside its id.
        Raises UsageError without root or
        for what this machine does not offer, before anything is touched where that can be known; NetworkError
        where the kernel refuses.
        """
        namespaces.require_root("building a network")
        if isinstance(emulator, str):
            from testbed.net import emulators

            emulator = emulators.choose(emulator)
        fabric = cls(emulator)
        try:
            fabric._make_namespaces(topology, run_id, name)
            fabric._wire(persistent)
            fabric._capture(captures, persistent)
            if persistent:
                fabric._update(replace(fabric.state, persistent=True))
        except BaseException:
            fabric.close()
            raise
        return fabric

    def _make_namespaces(self, topology: Topology, run_id: str | None, name: str) -> None:
        from testbed.net.fabric import wiring

        if not wiring.has_ipv6():
            topology = replace(topology, ipv6=False)
        # Not marked persistent before it is whole: what a killed `testbed up` leaves is a dead run like any
        # other.
        found = {number: self._segments(link, link.profile) for number, link in enumerate(topology.links)}
        self._super_packets = {number: each for number, each in found.items() if max(each.values()) > 1}
        with state.locked():
            self._state = state.new(topology, self.emulator.name, persistent=False, run_id=run_id, name=name)
            namespaces.prepare_directory(state.netns_marker())
            wiring.build(self._state, self._super_packets)

    def _wire(self, persistent: bool) -> None:
        from testbed.net.emulators.emulator import Wanted
        from testbed.net.fabric import wiring

        keep = self.state.keep if persistent else None
        if keep is not None:
            with as_root():
                keep.mkdir(parents=True)
        wanted = [
            Wanted(
                f"l{number}",
                *wiring.wire_ends(number),
                link.profile,
                (cell.name, cell.scheduler) if (cell := self.topology.cell(link)) is not None else None,
            )
            for number, link in enumerate(self.topology.links)
        ]
        self._attachments = list(self.emulator.attach_all(self.state.wire, wanted, keep=keep))
        for number in range(len(wanted)):
            self._shape_packets(number, wanted[number].profile)
        serving: dict[tuple[int, int], list[str]] = {}  # process -> the links that it serves
        for attachment, link in zip(self._attachments, self.topology.links, strict=True):
            if process := attachment.process:
                serving.setdefault(process, []).append(link.name)
        helpers = []
        for (pid, started), names in serving.items():
            others = f" and {len(names) - 1} others" if len(names) > 1 else ""
            helpers.append((pid, started, f"emulator of link {names[0]}{others}"))
        if helpers:
            with state.locked():
                self._state = state.add_processes(self.state, helpers)

    def _capture(self, directory: Path | None, persistent: bool) -> None:
        from testbed.hosts.namespaces import call_inside
        from testbed.net.fabric import capture, wiring

        named = {
            end: f"{link.name}-{node}"
            for number, link in enumerate(self.topology.links)
            if link.pcap
            for end, node in zip(wiring.wire_ends(number), (link.a, link.b), strict=True)
        }
        if not named:
            return
        with contextlib.ExitStack() as closing:
            if directory is None:
                directory = self.state.directory / "captures"
                closing.enter_context(as_root())
            with files.storing(directory):
                directory.mkdir(parents=True, exist_ok=True)
            opened = {
                end: closing.enter_context(files.writing(directory / f"{name}.pcap")).fileno()
                for end, name in named.items()
            }
            argv = [sys.executable, "-I", "-S", capture.__file__, "0" if persistent else str(os.getpid())]
            argv += [str(capture.SNAP_BYTES), str(capture.LIMIT_BYTES)]
            argv += [f"{end}={descriptor}" for end, descriptor in opened.items()]
            self._capturing = call_inside(
                self.state.wire,
                lambda: subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    pass_fds=list(opened.values()),
                    start_new_session=True,
                ),
            )
        self.record_process(self._capturing.pid, what="capture")
        assert self._capturing.stdout is not None
        with self._capturing.stdout as said:
            if said.readline() != b"capturing\n":
                raise NetworkError(f"cannot capture packets in {directory}")

    @property
    def state(self) -> State:
        """The record of this network. Raises NetworkError after `close`."""
        if self._state is None:
            raise NetworkError("the network is closed")
        return self._state

    @property
    def id(self) -> str:
        """The four digits that all names of this network carry."""
        return self.state.id

    @property
    def topology(self) -> Topology:
        """The topology with the profiles that are in force."""
        return self.state.topology

    @property
    def emulation(self) -> str:
        return self.emulator.name

    apart = closed = False
    one_clock = True

    def described(self) -> dict[str, dict[str, Any]]:
        return {}

    def host(self, node: str) -> Host:
        return hosts.host("namespace", name=self.namespace(node))

    def namespace(self, node: str) -> str:
        """The node's namespace, ``tb-<id>-<node>``, to be found under /run/netns. Raises SpecError: no such
        node."""
        return self.state.namespace(node)

    def address(self, node: str, link: str | None = None) -> str:
        return self.topology.address(node, link)

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        """Puts the link under another profile. Packets still under way are dropped and counted as `Counters.cleared` (see
        `settle`), so that none is met under the new one; connections survive. `origin_s`: when its traces begin
        (CLOCK_MONOTONIC); None: now. Raises SpecError: no such link, a trace's file is wrong; NetworkError."""
        number = self.topology.link_number(link)
        fresh = replace(self.state, topology=self.topology.with_profiles({link: profile}))
        from testbed.net.fabric import wiring

        if wiring.tcp_buffer_bytes(fresh.topology) != wiring.tcp_buffer_bytes(self.topology):
            wiring.allow_tcp_buffers(fresh)
        attachment = self._attachments[number]
        before = attachment.process
        attachment.apply(profile, origin_s, fresh=True)
        self._update(fresh)
        if attachment.process is not None and attachment.process != before:
            self.record_process(*attachment.process, f"emulator of link {link}")
        self._shape_packets(number, profile)

    def share_out(self, cell: str, scheduler: str) -> None:
        """Has a cell be shared out by another scheduler (canonical text) from now on. Raises SpecError: no such cell, or it does
        not suit it; NetworkError."""
        fresh = replace(self.state, topology=self.topology.with_scheduler(cell, scheduler))
        first = next(number for number, link in enumerate(self.topology.links) if link.cell == cell)
        self._attachments[first].share(scheduler)
        self._update(fresh)

    def settle(self, link: str, patience_s: float | None = None) -> bool:
        """Waits until nothing is under way on the link any more, such as the last packets of closed connections; whether that was
        so before `patience_s` were over. None: two round trips and a little, which background traffic may fill.

        Raises SpecError: no such link; NetworkError.
        """
        attachment = self._attachments[self.topology.link_number(link)]
        if patience_s is None:
            profile = self.topology.link(link).profile
            patience_s = min(_LONGEST_SETTLING_S, 2 * profile.steady().round_trip_s + _SETTLING_S)
        now = time.monotonic()
        until, quiet_since = now + patience_s, now
        while now < until:
            if attachment.under_way():
                quiet_since = now
            elif now - quiet_since >= _QUIET_S:
                return True
            time.sleep(_LOOK_S)
            now = time.monotonic()
        return False

    def hurry(self, link: str) -> bool:
        """See `Network.hurry`; not in a cell, whose users share what there is. Raises SpecError: no such link; NetworkError."""
        number = self.topology.link_number(link)
        return self.topology.links[number].cell is None and self._attachments[number].hurry()

    def check(self) -> None:
        for attachment, link in zip(self._attachments, self.topology.links, strict=True):
            if (fate := attachment.fate()) is not None:
                raise NetworkError(f"link {link.name}: {fate}")
        for process, what in self._watched:
            if process.status() is not None:
                raise NetworkError(
                    f"{what} (process {process.pid}) has ended: {process.last_words() or 'killed'}"
                )
            if (stopped_s := process.stopped_s()) > _STOPPED_S:
                raise NetworkError(
                    f"{what} (process {process.pid}) has been stopped for {stopped_s:.1f} s (SIGSTOP)"
                )
        if self._capturing is not None and self._capturing.poll() is not None:
            raise NetworkError(f"the capture of packets (process {self._capturing.pid}) has ended")

    @contextlib.contextmanager
    def watching(self, process: Process, what: str) -> Iterator[None]:
        self._watched.append((process, what))
        try:
            yield
        finally:
            self._watched.remove((process, what))

    def _segments(self, link: Link, profile: Profile) -> dict[str, int]:
        """How many may enter a link as one packet; in a cell, whose users take turns, only real ones."""
        return {"up": 1, "down": 1} if link.cell is not None else self.emulator.super_packets(profile)

    def _shape_packets(self, number: int, profile: Profile) -> None:
        """Sees to it that what enters the link is of the size that its profile, and its emulator, ask for."""
        from testbed.net.fabric import wiring

        if profile.up.mtu != self._mtus.get(number, MTU):
            wiring.set_mtu(self.state, number, profile.up.mtu)
            self._mtus[number] = profile.up.mtu
        segments = self._segments(self.topology.links[number], profile)
        if segments != self._super_packets.get(number, {"up": 1, "down": 1}):
            wiring.allow_super_packets(self.state, number, segments)
            self._super_packets[number] = segments

    def counters(self, link: str) -> dict[str, Counters]:
        """``{"up": …, "down": …}`` of the link since it was built. Raises SpecError: no such link."""
        return self._attachments[self.topology.link_number(link)].counters()

    def calibrate(self, link: str, profile: Profile) -> Calibration:
        from testbed.net.calibration.calibrate import calibrate

        return calibrate(self, link, profile, share=self.topology.alone(self.topology.link(link)))

    def record_process(self, pid: int, started: int | None = None, what: str = "helper") -> None:
        started = processes.start_time(pid) if started is None else started
        if started is not None:
            with state.locked():
                self._state = state.add_processes(self.state, [(pid, started, what)])

    def _update(self, fresh: State) -> None:
        with state.locked():
            state.write(fresh)
            self._state = fresh

    def close(self) -> None:
        """Removes the network and everything that still runs in it. May be called again."""
        if self._capturing is not None:
            self._capturing.terminate()
            self._capturing.wait()
            self._capturing = None
        attachments, self._attachments = self._attachments, []
        if attachments:
            with contextlib.suppress(Exception):  # what it leaves goes with its namespaces, or is on record
                self.emulator.release_all(attachments)
        if self._state is not None:
            with state.locked():
                removal.remove(self._state)
            self._state = None

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def up(
    topology: Topology,
    links: Mapping[str, Profile] | None = None,
    emulator: str | Emulator = "auto",
    captures: Path | None = None,
    name: str = "",
) -> State:
    """A network that outlives this process: the topology, some links (by name) under other profiles. See
    `removal.down`.

    Raises SpecError for an unknown link, and what `Fabric.build` raises.
    """
    return Fabric.build(
        topology.with_profiles(links or {}), emulator, persistent=True, captures=captures, name=name
    ).state
