"""A network for loads that has no links: nodes are this machine, and the processes on them real."""

from __future__ import annotations

from typing import Any

from testbed.net.loopback import Loopback
from testbed.net.topology.topology import Topology


class Plain(Topology):
    """Whose every node is reached at this machine's own address."""

    def address(self, node: str, link: str | None = None) -> str:
        return "127.0.0.1"


class Unlinked(Loopback):
    """In the place of a `Fabric`."""

    def __init__(self, topology: Topology) -> None:
        self.topology = Plain(topology.name, topology.nodes, topology.links, topology.ipv6)

    @classmethod
    def build(cls, topology: Topology, *_: Any, **__: Any) -> Unlinked:
        return cls(topology)
