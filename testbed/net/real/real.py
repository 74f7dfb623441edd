"""Machines of their own, and what lies between them: a link that is what it is, or that one of its hosts shapes."""

from __future__ import annotations

import contextlib
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed.errors import EndpointError, NetworkError, SpecError, UsageError
from testbed.hosts.asking import asked
from testbed.hosts.host import Host, Process
from testbed.hosts.installing import unfit
from testbed.net.profile.profile import Profile
from testbed.net.real.addresses import data_address, interface_of
from testbed.net.topology.topology import Node, Topology

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Counters
    from testbed.net.real.measuring import End
    from testbed.net.real.shaping import Shaping

_SETTLING_S = 0.2
#: Of what a host has: what may decide a run's times, the state of its clock among it.
_TOLD = frozenset(
    {
        "python",
        "testbed",
        "packages",
        "gpus",
        "board",
        "kernel",
        "machine",
        "cpu",
        "cores",
        "memory_bytes",
        "clock",
        "interfaces",
    }
)


class Real:
    """A `Network` of hosts. Leaving its ``with`` block, or `close`, ends what was started on them, and the connections.

    Make one with `open`.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._hosts: dict[str, Host] = {}
        self._found: dict[str, dict[str, Any]] = {}  # what there is, by node (`testbed.hosts.survey`)
        self._addresses: dict[str, str] = {}
        self._shapings: dict[str, Shaping] = {}
        self._closing = contextlib.ExitStack()

    @classmethod
    def open(cls, topology: Topology) -> Real:
        """Connected to every host; what dead runs of this machine left there is ended. Raises UsageError, EndpointError: a host
        cannot be reached; NetworkError: a node has no address for its data."""
        real = cls(topology)
        try:
            for node in topology.nodes:
                real._reach(node)
            for link in topology.links:
                real.apply(link.name, link.profile)
        except BaseException:
            real.close()
            raise
        return real

    def _reach(self, node: Node) -> None:
        assert node.host is not None
        host = node.host.host(node.python)
        if isinstance(host, AbstractContextManager):
            self._closing.enter_context(host)
        if (clean := getattr(host, "clean", None)) is not None:
            clean()
        self._hosts[node.name] = host
        python = sys.executable if node.host.local else node.python
        try:
            self._found[node.name] = asked(host, python, "survey")
        except EndpointError as error:
            raise EndpointError(f"node {node.name}: {error}") from error
        if not node.host.local and (why := unfit(self._found[node.name])):
            raise UsageError(f"node {node.name}: {node.host}: {why}")
        try:
            self._addresses[node.name] = data_address(node, host, self._found[node.name])
        except (SpecError, NetworkError) as error:
            raise type(error)(f"node {node.name}: {error}") from error

    @property
    def emulation(self) -> str:
        return "netem" if any(link.shape for link in self.topology.links) else "real"

    @property
    def apart(self) -> bool:
        return any(node.host is not None and not node.host.local for node in self.topology.nodes)

    @property
    def one_clock(self) -> bool:
        return len({found["monotonic"] for found in self._found.values()}) == 1

    closed = True

    def host(self, node: str) -> Host:
        return self._hosts[self.topology.require_node(node)]

    def address(self, node: str, link: str | None = None) -> str:
        if link is not None:
            self.topology.link_number(link)
        return self._addresses[self.topology.require_node(node)]

    def described(self) -> dict[str, dict[str, Any]]:
        return {
            node.name: {
                **self._hosts[node.name].describe(),
                "host": str(node.host),
                "address": self._addresses[node.name],
                **{about: found for about, found in self._found[node.name].items() if about in _TOLD},
            }
            for node in self.topology.nodes
        }

    def record_process(self, pid: int, started: int | None = None, what: str = "helper") -> None:
        """A host has its own record of what runs there."""

    def watching(self, process: Process, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        # A topology refuses all that such a link cannot be.
        self.topology = self.topology.with_profiles({link: profile})
        if self.topology.link(link).shape is not None:
            self._shaping(link).apply(profile)

    def _shaping(self, link: str) -> Shaping:
        """What shapes a link, begun where it was not."""
        if link not in self._shapings:
            from testbed.net.real.shaping import Shaping

            ends = self.topology.link(link)
            node, other = (ends.a, ends.b) if ends.shape == ends.a else (ends.b, ends.a)
            here = next(each for each in self.topology.nodes if each.name == node)
            interface = here.interface or interface_of(self._addresses[node], self._found[node])
            if not interface:
                raise NetworkError(
                    f"node {node}: none of its interfaces has the address {self._addresses[node]}"
                )
            local = here.host is not None and here.host.local
            shaping = Shaping(
                self._hosts[node],
                interface,
                self._addresses[other],
                "up" if node == ends.a else "down",
                force=ends.force,
                # From this machine SSH goes out to the other one; to another, it comes in, and is found there.
                ssh=self._ssh_goes_to(other) if local else [],
            )
            self._shapings[link] = self._closing.enter_context(shaping)
        return self._shapings[link]

    def _ssh_goes_to(self, node: str) -> list[str]:
        first_hop = getattr(self._hosts[node], "first_hop", None)
        hop = first_hop() if first_hop is not None else ""
        return [hop or str(self._found[node]["ssh_address"])]

    def settle(self, link: str, patience_s: float | None = None) -> bool:
        """Waits a little: nobody can say what is under way."""
        self.topology.link_number(link)
        time.sleep(_SETTLING_S if patience_s is None else min(patience_s, _SETTLING_S))
        return True

    def hurry(self, link: str) -> bool:
        """Nobody can make a link faster."""
        self.topology.link_number(link)
        return False

    def counters(self, link: str) -> dict[str, Counters]:
        """Nobody counts what no host shapes: an interface's own figures have others' packets in them."""
        self.topology.link_number(link)
        return self._shapings[link].counters() if link in self._shapings else {}

    def calibrate(self, link: str, profile: Profile) -> Calibration:
        from testbed.net.real.measuring import measure

        ends = self.topology.link(link)
        first, second = self._end(ends.a), self._end(ends.b)
        return measure(link, first, second, partial(self.clocks, ends.a, ends.b), profile, self.emulation)

    def clocks(self, a: str, b: str) -> tuple[float, float]:
        """By how much node b's clock is ahead of node a's, as seen over SSH, and how far that may be off; seconds."""
        (ahead_a, off_a), (ahead_b, off_b) = self._hosts[a].clock(), self._hosts[b].clock()
        return ahead_b - ahead_a, off_a + off_b

    def _end(self, node: str) -> End:
        from testbed.net.real.measuring import End

        return End(node, self._hosts[node], self._addresses[node])

    def check(self) -> None:
        """Raises NetworkError where a link is not shaped as it should be. A process says itself that its host is gone."""
        for shaping in self._shapings.values():
            shaping.check()

    def close(self) -> None:
        """May be called again."""
        self._closing.close()

    def __enter__(self) -> Real:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
