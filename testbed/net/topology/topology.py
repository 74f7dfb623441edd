"""Nodes and the links between them: what a network consists of, however it was written down (`files`).

A link's *up* direction runs from ``a`` to ``b``. Addresses and routes follow from the links (`routing`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from testbed import kinds
from testbed.errors import SpecError
from testbed.hosts.address import Address
from testbed.net.profile.profile import Profile
from testbed.net.sharing import MOST_USERS, SCHEDULERS
from testbed.net.sharing.contract import Scheduler
from testbed.net.topology import routing
from testbed.net.topology.routing import Interface, Route, Tree
from testbed.strict_yaml import did_you_mean

MAX_NODES = 1000
MAX_LINKS = 4000
_NODE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_-]{0,30}[A-Za-z0-9])?")
_LINK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_CONGESTION_NAME = re.compile(r"[a-z0-9_]{1,15}")
#: A path of the host's, or a name on its PATH.
PYTHON = "python3"
_RESERVED = {"wire": "the links' middles are called that", "localhost": "it means every node itself"}


@dataclass(frozen=True)
class Node:
    """One host of the network. Its name is a host name: lower-case letters, digits and hyphens.

    host: a machine of its own; None: a namespace of this one. What follows is of such a machine alone. python: which has the
    testbed there; device: its side's, where a scenario says ``auto``; interface, address: where its data comes in, IPv4; None:
    the address of the interface, or else that by which SSH reaches it.
    """

    name: str
    host: Address | None = None
    python: str = PYTHON
    device: str | None = None
    interface: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class Link:
    """Two nodes' connection; *up* is from `a` to `b`. `congestion`: None for the kernel's default.
    `pcap`: whether the packets at both of its ends are captured to files. `shape`: between machines of their own, the node whose
    host imposes the profile; None: that link is what it is. `force`: also on an interface that carries SSH."""

    name: str
    a: str
    b: str
    profile: Profile
    congestion: str | None = None
    pcap: bool = False
    shape: str | None = None
    force: bool = False
    cell: str | None = None
    """The cell whose medium is this link's bottleneck, by name."""


@dataclass(frozen=True)
class Cell:
    """One medium that several links share: what each gets of it, in each direction, is up to a scheduler
    (`testbed.net.sharing`). A link's own rate, or trace, is what it gets while the medium is all its own."""

    name: str
    scheduler: str

    @property
    def sharing(self) -> Scheduler:
        """What `scheduler` says. Raises SpecError."""
        return kinds.parse(self.scheduler, SCHEDULERS, "scheduler")


@dataclass(frozen=True)
class Topology:
    """Raises SpecError where the nodes and links do not make one connected network."""

    name: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    ipv6: bool = True
    cells: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        _validate(self)

    @cached_property
    def kind(self) -> Literal["namespaces", "hosts"]:
        """What its nodes are: all of them namespaces of this machine, or all of them machines of their own."""
        return "hosts" if self.nodes[0].host is not None else "namespaces"

    def node(self, name: str) -> Node:
        """The node called `name`. Raises SpecError, with what there is."""
        self.require_node(name)
        return next(node for node in self.nodes if node.name == name)

    def link(self, name: str) -> Link:
        """The link called `name`. Raises SpecError, with what there is."""
        return self.links[self.link_number(name)]

    def link_number(self, name: str) -> int:
        """The number of the link called `name`: its place in `links`. Raises SpecError, with what there
        is."""
        if name not in self._link_numbers:
            known = list(self._link_numbers)
            raise SpecError(f"topology {self.name} has no link {name!r}{did_you_mean(name, known)}")
        return self._link_numbers[name]

    @cached_property
    def _link_numbers(self) -> dict[str, int]:
        return {link.name: number for number, link in enumerate(self.links)}

    def require_node(self, name: str) -> str:
        """`name`, if there is such a node. Raises SpecError, with what there is."""
        if name not in self.ends:
            raise SpecError(f"topology {self.name} has no node {name!r}{did_you_mean(name, list(self.ends))}")
        return name

    def with_profiles(self, profiles: Mapping[str, Profile]) -> Topology:
        """The same topology, some links' profiles replaced (link name -> profile). Raises SpecError for
        unknown links."""
        for name in profiles:
            self.link_number(name)
        links = tuple(replace(link, profile=profiles.get(link.name, link.profile)) for link in self.links)
        return replace(self, links=links)

    def with_scheduler(self, cell: str, scheduler: str) -> Topology:
        """The same topology, one cell shared out by another scheduler. Raises SpecError: no such cell, or it does not suit it."""
        names = [each.name for each in self.cells]
        if cell not in names:
            raise SpecError(f"topology {self.name} has no cell {cell!r}{did_you_mean(cell, names)}")
        cells = (Cell(cell, scheduler) if each.name == cell else each for each in self.cells)
        return replace(self, cells=tuple(cells))

    def cell(self, link: Link) -> Cell | None:
        """The cell that a link is in."""
        return next((cell for cell in self.cells if cell.name == link.cell), None)

    def alone(self, link: Link) -> float:
        """The share of its own rate that a link has while no other link of its cell sends anything."""
        cell = self.cell(link)
        if cell is None:
            return 1.0
        members = [each.name for each in self.links if each.cell == cell.name]
        return cell.sharing.alone(members.index(link.name), len(members))

    def contend(self, link: Link, other: Link) -> bool:
        """Whether what one of two links gets depends on what is sent on the other."""
        cell = self.cell(link)
        return cell is not None and other.cell == cell.name and not cell.sharing.fixed

    @cached_property
    def ends(self) -> dict[str, tuple[Interface, ...]]:
        """Every node's ends of its links, in the order of the links: eth0, eth1, …"""
        return routing.interfaces(
            (node.name for node in self.nodes), [(link.a, link.b) for link in self.links], self.ipv6
        )

    @cached_property
    def tree(self) -> Tree | None:
        """How its links hang together, where they make no circle."""
        return Tree(self.ends) if len(self.links) == len(self.nodes) - 1 else None

    def interfaces(self, node: str) -> tuple[Interface, ...]:
        """The node's ends of its links, in the order of the links: eth0, eth1, …"""
        return self.ends[self.require_node(node)]

    def address(self, node: str, link: str | None = None) -> str:
        """The node's address on the named link, or on its first. Raises SpecError where it is not on that
        link."""
        interfaces = self.interfaces(node)
        if link is None:
            return interfaces[0].address
        number = self.link_number(link)
        for interface in interfaces:
            if interface.link == number:
                return interface.address
        raise SpecError(f"topology {self.name}: node {node!r} is not on link {link!r}")

    def forwards(self, node: str) -> bool:
        """Whether the node is a router: it has more than one link."""
        return len(self.interfaces(node)) > 1

    def congestion(self, node: str) -> str | None:
        """The node's default congestion control: that of the first of its links that names one."""
        named = (self.links[interface.link].congestion for interface in self.interfaces(node))
        return next((name for name in named if name), None)

    def routes(self, node: str) -> tuple[Route, ...]:
        """The node's routes to all links it is not on itself; one for everything where it has a single link."""
        return routing.routes(self.require_node(node), self.ends, self.tree, self.ipv6)

    def links_named(self, name: str) -> list[int]:
        """The numbers of the links that a link's name, or that of a node on them, stands for. Raises SpecError."""
        if name in [node.name for node in self.nodes]:
            return [end.link for end in self.interfaces(name)]
        return [self.link_number(name)]

    def hosts(self, node: str) -> str:
        """The text of /etc/hosts as `node` should see it: every node by the addresses at which its packets
        arrive there."""
        return routing.hosts(self.require_node(node), self.ends)


def _validate(topology: Topology) -> None:
    names = [node.name for node in topology.nodes]
    if not 2 <= len(names) <= MAX_NODES:
        raise SpecError(f"nodes: {len(names)} of them; a network has 2 to {MAX_NODES}")
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        _check_name(
            name,
            f"nodes[{place}]",
            _NODE_NAME,
            "start with a letter, then up to 31 letters, digits, hyphens and underscores",
        )
        if name.lower() in _RESERVED:
            raise SpecError(f"nodes[{place}]: a node cannot be called {name!r}: {_RESERVED[name.lower()]}")
        if (
            name.lower() in map(str.lower, places) and name not in places
        ):  # whom /etc/hosts does not tell apart
            raise SpecError(f"nodes[{place}]: nodes {name!r} and another differ in capitals alone")
        if name in places:
            raise SpecError(f"nodes[{place}]: node {name!r} is named twice")
        places[name] = place
    if not 1 <= len(topology.links) <= MAX_LINKS:
        raise SpecError(f"links: {len(topology.links)} of them; a network has 1 to {MAX_LINKS}")
    seen: dict[str, int] = {}
    pairs: dict[frozenset[str], int] = {}
    for place, link in enumerate(topology.links):
        where = f"links[{place}]"
        _check_link(link, where, places)
        if link.name in seen:
            raise SpecError(f"{where}.name: links[{seen[link.name]}] is called {link.name!r} already")
        pair = frozenset((link.a, link.b))
        if pair in pairs:
            raise SpecError(f"{where}: links[{pairs[pair]}] joins {link.a!r} and {link.b!r} already")
        seen[link.name] = pairs[pair] = place
    _check_connected(names, topology.links)
    _check_hosts(topology)
    _check_cells(topology)


def _check_cells(topology: Topology) -> None:
    """What can share a medium."""
    members: dict[str, list[Link]] = {}
    for place, cell in enumerate(topology.cells):
        where = f"cells[{place}]"
        _check_name(
            cell.name,
            f"{where}.name",
            _NODE_NAME,
            "start with a letter, then letters, digits, hyphens and underscores",
        )
        if cell.name in members:
            raise SpecError(f"{where}: cell {cell.name!r} is named twice")
        members[cell.name] = []
        if str(cell.sharing) != cell.scheduler:
            raise SpecError(f"{where}: scheduler {cell.scheduler!r} is written {cell.sharing}")
    for place, link in enumerate(topology.links):
        if link.cell is None:
            continue
        where = f"links[{place}]"
        if link.cell not in members:
            raise SpecError(
                f"{where}.cell: no cell {link.cell[:40]!r}{did_you_mean(link.cell, list(members))}"
            )
        members[link.cell].append(link)
        if topology.kind == "hosts":
            raise SpecError(f"{where}.cell: a cell is emulated, and these nodes are hosts of their own")
        for way, direction in link.profile.ways.items():
            if not direction.limited:
                raise SpecError(
                    f"{where}.profile: {way} has no rate, and there is nothing to share out in a cell; give it rate= or a trace"
                )
    for name, links in members.items():
        if not 1 <= len(links) <= MOST_USERS:
            raise SpecError(f"cell {name}: {len(links)} links in it; a cell has 1 to {MOST_USERS}")
        next(cell for cell in topology.cells if cell.name == name).sharing.check(len(links))


def _check_hosts(topology: Topology) -> None:
    """What machines of their own can do, and what only they can."""
    real = [node.host is not None for node in topology.nodes]
    if any(real) and not all(real):
        node = topology.nodes[real.index(False)].name
        raise SpecError(
            f"nodes.{node}: host is missing; either every node is on a host of its own, or none is"
        )
    for place, link in enumerate(topology.links):
        where, shaped = f"links[{place}]", link.shape is not None
        if not any(real):
            if link.profile.measured or shaped or link.force:
                what = "profile: measured" if link.profile.measured else "shape" if shaped else "force"
                raise SpecError(
                    f"{where}: {what} is for links between hosts; its nodes are namespaces of this machine"
                )
            continue
        if link.pcap:
            raise SpecError(
                f"{where}.pcap: packets are not captured between hosts; use tcpdump on one of them"
            )
        if link.profile.measured == shaped:
            raise SpecError(
                f"{where}: the link is what it is (profile: measured, without shape), or one of its hosts shapes it (a profile, "
                f"and shape: {link.a}|{link.b})"
            )
        if shaped and link.shape not in (link.a, link.b):
            raise SpecError(
                f"{where}.shape: {str(link.shape)[:40]!r} is no end of it; write {link.a} or {link.b}"
            )
        if link.profile.changes:
            raise SpecError(
                f"{where}.profile: {link.profile.name} changes over time; a shaped link takes a steady profile"
            )


def _check_name(name: str, where: str, pattern: re.Pattern[str], rule: str) -> None:
    if not pattern.fullmatch(name):
        raise SpecError(f"{where}: the name {name[:40]!r} does not do; {rule}")


def _check_link(link: Link, where: str, nodes: Mapping[str, int]) -> None:
    _check_name(link.name, f"{where}.name", _LINK_NAME, "use letters, digits, hyphens, underscores and dots")
    for end, node in (("a", link.a), ("b", link.b)):
        if node not in nodes:
            raise SpecError(f"{where}.{end}: unknown node {node[:40]!r}{did_you_mean(node, list(nodes))}")
    if link.a == link.b:
        raise SpecError(f"{where}: a link from {link.a!r} to itself")
    if link.congestion is not None and not _CONGESTION_NAME.fullmatch(link.congestion):
        raise SpecError(
            f"{where}.congestion: {link.congestion[:40]!r} is no congestion control; write for example cubic"
        )


def _check_connected(names: list[str], links: tuple[Link, ...]) -> None:
    neighbours: dict[str, list[str]] = {name: [] for name in names}
    for link in links:
        neighbours[link.a].append(link.b)
        neighbours[link.b].append(link.a)
    reached, waiting = {names[0]}, [names[0]]
    while waiting:
        fresh = [name for name in neighbours[waiting.pop()] if name not in reached]
        reached.update(fresh)
        waiting.extend(fresh)
    if len(reached) < len(names):
        alone = next(name for name in names if name not in reached)
        raise SpecError(f"links: no path from {names[0]!r} to {alone!r}")
