"""Machines of their own, and what lies between them: a link that is what it is, or that one of its hosts shapes."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed.errors import NetworkError, SpecError
from testbed.hosts.host import Host, Process
from testbed.net.profile.profile import Profile
from testbed.net.topology.topology import Node, Topology

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Counters
    from testbed.net.real.measuring import End

_SETTLING_S = 0.2


class Real:
    """A `Network` of hosts. Leaving its ``with`` block, or `close`, ends what was started on them, and the connections.

    Make one with `open`.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._hosts: dict[str, Host] = {}
        self._addresses: dict[str, str] = {}
        self._closing = contextlib.ExitStack()

    @classmethod
    def open(cls, topology: Topology) -> Real:
        """Connected to every host; what dead runs of this machine left there is ended. Raises UsageError, EndpointError: a host
        cannot be reached; NetworkError: a node has no address for its data."""
        real = cls(topology)
        try:
            for node in topology.nodes:
                assert node.host is not None
                host = node.host.host(node.python)
                if isinstance(host, AbstractContextManager):
                    real._closing.enter_context(host)
                if (clean := getattr(host, "clean", None)) is not None:
                    clean()
                real._hosts[node.name] = host
            for node in topology.nodes:
                real._addresses[node.name] = real._find_address(node)
        except BaseException:
            real.close()
            raise
        return real

    def _find_address(self, node: Node) -> str:
        if node.address:
            return node.address
        host = self._hosts[node.name]
        if node.interface:
            from testbed.net.real.measuring import answer

            argv = host.module("testbed.net.real.end", "address", node.interface)
            with host.start(argv, {}) as process:
                found = answer(process, f"node {node.name}")
            if found["address"]:
                return str(found["address"])
            known = ", ".join(f"{name} ({address})" for name, address in found["interfaces"].items())
            raise NetworkError(
                f"node {node.name}: no interface {node.interface} with an IPv4 address there; it has {known}"
            )
        addresses = getattr(host, "addresses", None)
        if addresses is None:
            raise SpecError(
                f"node {node.name}: host: local needs address: or interface:, for its peer to reach it"
            )
        return str(addresses()[1])

    @property
    def emulation(self) -> str:
        return "netem" if any(link.shape for link in self.topology.links) else "real"

    @property
    def apart(self) -> bool:
        return any(node.host is not None and not node.host.local for node in self.topology.nodes)

    closed = True

    def host(self, node: str) -> Host:
        return self._hosts[self.topology.require_node(node)]

    def address(self, node: str, link: str | None = None) -> str:
        if link is not None:
            self.topology.link_number(link)
        return self._addresses[self.topology.require_node(node)]

    def described(self) -> dict[str, dict[str, Any]]:
        return {
            node.name: {"host": str(node.host), "address": self._addresses[node.name], **self._about(node)}
            for node in self.topology.nodes
        }

    def _about(self, node: Node) -> dict[str, Any]:
        return self._hosts[node.name].describe()

    def record_process(self, pid: int, started: int | None = None, what: str = "helper") -> None:
        """A host has its own record of what runs there."""

    def watching(self, process: Process, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        # A topology refuses all that such a link cannot be.
        self.topology = self.topology.with_profiles({link: profile})

    def settle(self, link: str, patience_s: float | None = None) -> bool:
        """Waits a little: nobody can say what is under way."""
        self.topology.link_number(link)
        time.sleep(_SETTLING_S if patience_s is None else min(patience_s, _SETTLING_S))
        return True

    def counters(self, link: str) -> dict[str, Counters]:
        """Nobody counts: an interface's own figures have others' packets in them."""
        self.topology.link_number(link)
        return {}

    def calibrate(self, link: str, profile: Profile) -> Calibration:
        from testbed.net.real.measuring import measure

        ends = self.topology.link(link)
        first, second = self._end(ends.a), self._end(ends.b)

        def clocks() -> tuple[float, float]:
            (a, off_a), (b, off_b) = first.host.clock(), second.host.clock()
            return b - a, off_a + off_b

        return measure(link, first, second, clocks, profile, self.emulation)

    def _end(self, node: str) -> End:
        from testbed.net.real.measuring import End

        return End(node, self._hosts[node], self._addresses[node])

    def check(self) -> None:
        """A process says itself that its host is gone."""

    def close(self) -> None:
        """May be called again."""
        self._closing.close()

    def __enter__(self) -> Real:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
