"""Nodes and the links between them, and how packets get from any node to any other.

A topology file (see ``topologies/``)::

    nodes: [edge, cloud]
    links:
      - {a: edge, b: cloud, profile: 5g-mid, congestion: cubic}

A link's *up* direction runs from ``a`` to ``b``. ``name`` of a link is ``a-b`` where it is left out, that of
the topology the file's. ``congestion`` names the TCP congestion control of connections that leave a node by
that link.

Addresses are in 10.0.0.0/8: link number *k* is 10.*k* div 256.*k* mod 256.0/30, its ``a`` end .1 and its
``b`` end .2. Routes are shortest paths by hops, ties going to the link that comes first.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed.errors import SpecError
from testbed.net import strict_yaml
from testbed.net.profile import Profile, profile_from
from testbed.net.strict_yaml import did_you_mean

MAX_NODES = 1000
MAX_LINKS = 4000
_NODE_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_LINK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
_CONGESTION_NAME = re.compile(r"[a-z0-9_]{1,15}")
_RESERVED = {"wire": "the links' middles are called that", "localhost": "it means every node itself"}
_FOLDER = "topologies"


@dataclass(frozen=True)
class Node:
    """One host of the network. Its name is a host name: lower-case letters, digits and hyphens."""

    name: str


@dataclass(frozen=True)
class Link:
    """Two nodes' connection; *up* is from `a` to `b`. `congestion`: None for the kernel's default."""

    name: str
    a: str
    b: str
    profile: Profile
    congestion: str | None = None


@dataclass(frozen=True)
class Interface:
    """One end of a link, in its node."""

    node: str
    name: str  # "eth0", counted per node
    link: int  # the link's number
    end: str  # "a" or "b"
    address: str
    peer: str  # the other end's address
    peer_node: str
    network: str  # "10.0.0.0/30"


@dataclass(frozen=True)
class Route:
    """What a node does with packets for `destination` ("10.0.3.0/30")."""

    destination: str
    via: str
    interface: str
    link: int  # the number of the link it leads into


@dataclass(frozen=True)
class Topology:
    """Raises SpecError where the nodes and links do not make one connected network."""

    name: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        _validate(self)

    def link(self, name: str) -> Link:
        """The link called `name`. Raises SpecError, with what there is."""
        return self.links[self.link_number(name)]

    def link_number(self, name: str) -> int:
        """The number of the link called `name`: its place in `links`. Raises SpecError, with what there
        is."""
        known = [link.name for link in self.links]
        if name not in known:
            raise SpecError(f"topology {self.name} has no link {name!r}{did_you_mean(name, known)}")
        return known.index(name)

    def require_node(self, name: str) -> str:
        """`name`, if there is such a node. Raises SpecError, with what there is."""
        known = [node.name for node in self.nodes]
        if name not in known:
            raise SpecError(f"topology {self.name} has no node {name!r}{did_you_mean(name, known)}")
        return name

    def with_profiles(self, profiles: Mapping[str, Profile]) -> Topology:
        """The same topology, some links' profiles replaced (link name -> profile). Raises SpecError for
        unknown links."""
        for name in profiles:
            self.link_number(name)
        links = tuple(replace(link, profile=profiles.get(link.name, link.profile)) for link in self.links)
        return replace(self, links=links)

    @cached_property
    def _interfaces(self) -> dict[str, tuple[Interface, ...]]:
        found: dict[str, list[Interface]] = {node.name: [] for node in self.nodes}
        for number, link in enumerate(self.links):
            a, b, network = f"{_prefix(number)}.1", f"{_prefix(number)}.2", f"{_prefix(number)}.0/30"
            for node, end, address, peer, peer_node in (
                (link.a, "a", a, b, link.b),
                (link.b, "b", b, a, link.a),
            ):
                name = f"eth{len(found[node])}"
                found[node].append(Interface(node, name, number, end, address, peer, peer_node, network))
        return {node: tuple(interfaces) for node, interfaces in found.items()}

    def interfaces(self, node: str) -> tuple[Interface, ...]:
        """The node's ends of its links, in the order of the links: eth0, eth1, …"""
        return self._interfaces[self.require_node(node)]

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

    def _first_hops(self, node: str) -> dict[str, tuple[Interface, Interface]]:
        # other node -> (the interface to leave by, the interface of the other node that packets arrive at),
        # breadth first
        found: dict[str, tuple[Interface, Interface]] = {}
        queue: deque[tuple[str, Interface | None]] = deque([(node, None)])
        while queue:
            here, first = queue.popleft()
            for interface in self._interfaces[here]:
                there = interface.peer_node
                if there == node or there in found:
                    continue
                arrival = next(other for other in self._interfaces[there] if other.link == interface.link)
                found[there] = (first or interface, arrival)
                queue.append((there, first or interface))
        return found

    def routes(self, node: str) -> tuple[Route, ...]:
        """The node's routes to all links it is not on itself; one for everything where it has a single
        link."""
        own = self.interfaces(node)
        if len(own) == 1:
            everything = Route("10.0.0.0/8", own[0].peer, own[0].name, own[0].link)
            return (everything,) if len(self.links) > 1 else ()
        hops = self._first_hops(node)
        order = {name: place for place, name in enumerate(hops)}  # nearest first
        attached = {interface.link for interface in own}
        found = []
        for number, link in enumerate(self.links):
            if number not in attached:
                nearest = min((link.a, link.b), key=order.__getitem__)
                out = hops[nearest][0]
                found.append(Route(f"{_prefix(number)}.0/30", out.peer, out.name, out.link))
        return tuple(found)

    def hosts(self, node: str) -> str:
        """The text of /etc/hosts as `node` should see it: every node by the address at which its packets
        arrive there."""
        lines = ["127.0.0.1 localhost", "::1 localhost", f"{self.address(node)} {node}"]
        lines += [
            f"{arrival.address} {name}" for name, (_, arrival) in sorted(self._first_hops(node).items())
        ]
        return "\n".join(lines) + "\n"


def _prefix(number: int) -> str:
    return f"10.{number // 256}.{number % 256}"


def _validate(topology: Topology) -> None:
    names = [node.name for node in topology.nodes]
    if not 2 <= len(names) <= MAX_NODES:
        raise SpecError(f"nodes: {len(names)} of them; a network has 2 to {MAX_NODES}")
    for place, name in enumerate(names):
        _check_name(
            name, f"nodes[{place}]", _NODE_NAME, "start with a letter, then up to 31 of a-z, 0-9 and hyphens"
        )
        if name in _RESERVED:
            raise SpecError(f"nodes[{place}]: a node cannot be called {name!r}: {_RESERVED[name]}")
        if name in names[:place]:
            raise SpecError(f"nodes[{place}]: node {name!r} is named twice")
    if not 1 <= len(topology.links) <= MAX_LINKS:
        raise SpecError(f"links: {len(topology.links)} of them; a network has 1 to {MAX_LINKS}")
    seen: dict[str, int] = {}
    pairs: dict[frozenset[str], int] = {}
    for place, link in enumerate(topology.links):
        where = f"links[{place}]"
        _check_link(link, where, names)
        if link.name in seen:
            raise SpecError(f"{where}.name: links[{seen[link.name]}] is called {link.name!r} already")
        pair = frozenset((link.a, link.b))
        if pair in pairs:
            raise SpecError(f"{where}: links[{pairs[pair]}] joins {link.a!r} and {link.b!r} already")
        seen[link.name] = pairs[pair] = place
    _check_connected(names, topology.links)


def _check_name(name: str, where: str, pattern: re.Pattern[str], rule: str) -> None:
    if not pattern.fullmatch(name):
        raise SpecError(f"{where}: the name {name[:40]!r} does not do; {rule}")


def _check_link(link: Link, where: str, nodes: list[str]) -> None:
    _check_name(link.name, f"{where}.name", _LINK_NAME, "use letters, digits, hyphens, underscores and dots")
    for end, node in (("a", link.a), ("b", link.b)):
        if node not in nodes:
            raise SpecError(f"{where}.{end}: unknown node {node[:40]!r}{did_you_mean(node, nodes)}")
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


def load_topology(name_or_path: str | Path) -> Topology:
    """The topology of a file, or of the shipped file of that name (``edge-cloud``). Raises SpecError naming
    file and place."""
    path = _find(name_or_path)
    return topology_from(strict_yaml.read(path), str(path), path.stem)


def shipped_topologies() -> list[Path]:
    """The topology files that come with the testbed, and those in ``topologies/`` of the current
    directory."""
    folders = (Path(_FOLDER), Path(__file__).resolve().parents[2] / _FOLDER)
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return list(found.values())


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {path.stem: path for path in shipped_topologies()}
    if path.parent == Path() and not path.suffix and path.name in shipped:
        return shipped[path.name]
    if path.is_dir():
        raise SpecError(f"{path}: a directory, not a topology file")
    raise SpecError(f"no topology {str(path)!r}{did_you_mean(path.name, list(shipped)) if shipped else ''}")


def topology_from(value: Any, where: str, name: str) -> Topology:
    """The topology a YAML mapping describes. Raises SpecError beginning with `where`."""
    try:
        strict_yaml.mapping(value, "", {"name", "nodes", "links"}, {"nodes", "links"})
        nodes = tuple(
            Node(strict_yaml.text(node, f"nodes[{place}]"))
            for place, node in enumerate(strict_yaml.items(value["nodes"], "nodes"))
        )
        links = tuple(
            _link(link, f"links[{place}]")
            for place, link in enumerate(strict_yaml.items(value["links"], "links"))
        )
        return Topology(strict_yaml.text(value.get("name", name), "name"), nodes, links)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _link(value: Any, where: str) -> Link:
    strict_yaml.mapping(value, where, {"name", "a", "b", "profile", "congestion"}, {"a", "b", "profile"})
    a, b = strict_yaml.text(value["a"], f"{where}.a"), strict_yaml.text(value["b"], f"{where}.b")
    congestion = value.get("congestion")
    return Link(
        name=strict_yaml.text(value.get("name", f"{a}-{b}"), f"{where}.name"),
        a=a,
        b=b,
        profile=profile_from(value["profile"], f"{where}.profile"),
        congestion=None if congestion is None else strict_yaml.text(congestion, f"{where}.congestion"),
    )
