"""Nodes and the links between them.

A topology file (see ``topologies/``)::

    nodes: [edge, cloud]
    links:
      - {a: edge, b: cloud, profile: 5g-mid, congestion: cubic}

A link's *up* direction runs from ``a`` to ``b``. ``name`` of a link is ``a-b`` where it is left out, that of
the topology the file's. ``congestion`` names the TCP congestion control of connections that leave a node by
that link.

What repeats itself need not be listed::

    kind: line                       n1 ═ n2 ═ n3 ═ …            links n1-n2, n2-n3, …; up: towards the higher number
    nodes: 10
    profile: wan

    kind: star                       n1 ═╗                       links n1-hub, n2-hub, …; up: towards the hub
    nodes: 100                       n2 ═╬═ hub                  `nodes` counts the hub, too
    profile: 5g-mid                  n3 ═╝

    kind: shared-bottleneck          edge1 ═╗                    links access-1, access-2, … and bottleneck;
    nodes: 12                        edge2 ═╬═ router ═ cloud    up: towards the cloud; `nodes` counts router and cloud, too
    profile: 5g-good                 edge3 ═╝
    bottleneck: "rate=60mbit,delay=5ms"

There, `profile` is every link's; ``profiles: {n3-hub: lte}`` puts some under others. ``congestion`` is every link's congestion
control; ``pcap: [n3-hub]`` names links whose packets are captured.

Addresses and routes follow from the links (see `testbed.net.topology.routing`); ``ipv6: false`` leaves IPv6 out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed import strict_yaml
from testbed.errors import SpecError
from testbed.net.profile import lookup
from testbed.net.profile.profile import Profile, profile_from
from testbed.net.topology import routing
from testbed.net.topology.routing import Interface, Route, Tree
from testbed.strict_yaml import did_you_mean

Listed = tuple[list[str], list[tuple[str, str, str]]]
"""Names of nodes, and links as (name, a, b)."""


def line(nodes: int) -> Listed:
    """n1 - n2 - n3 - …"""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    return names, [(f"{a}-{b}", a, b) for a, b in itertools.pairwise(names)]


def star(nodes: int) -> Listed:
    """A hub, and everybody else on a link of its own to it."""
    leaves = [f"n{number}" for number in range(1, nodes)]
    return ["hub", *leaves], [(f"{leaf}-hub", leaf, "hub") for leaf in leaves]


def shared_bottleneck(nodes: int) -> Listed:
    """Edges on access links of their own to a router, from which one link leads to the cloud."""
    edges = [f"edge{number}" for number in range(1, nodes - 1)]
    access = [(f"access-{number}", edge, "router") for number, edge in enumerate(edges, 1)]
    return [*edges, "router", "cloud"], [*access, ("bottleneck", "router", "cloud")]


KINDS: dict[str, tuple[Callable[[int], Listed], int]] = {
    "line": (line, 2),
    "star": (star, 2),
    "shared-bottleneck": (shared_bottleneck, 3),
}
"""Name -> the shape, and the fewest nodes it has."""

REPEATED_KEYS = {"name", "kind", "nodes", "profile", "bottleneck", "profiles", "congestion", "pcap", "ipv6"}


def unfold(value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with every node and link listed, as `topology_from` takes it. Raises SpecError."""
    strict_yaml.mapping(value, "", REPEATED_KEYS, {"kind", "nodes", "profile"})
    kind = strict_yaml.text(value["kind"], "kind")
    if kind not in KINDS:
        raise SpecError(f"kind: unknown kind {kind[:40]!r}{did_you_mean(kind, list(KINDS))}")
    shape, least = KINDS[kind]
    names, links = shape(strict_yaml.whole(value["nodes"], "nodes", least, MAX_NODES))
    profiles = _profiles(value, kind, [name for name, _, _ in links])
    common = {key: value[key] for key in ("congestion",) if key in value}
    captured = _captured(value, [name for name, _, _ in links])
    listed = [
        {"name": name, "a": a, "b": b, "profile": profiles.get(name, value["profile"]), **common}
        | ({"pcap": True} if name in captured else {})
        for name, a, b in links
    ]
    rest = {key: value[key] for key in ("name", "ipv6") if key in value}
    return {"nodes": names, "links": listed, **rest}


def _captured(value: Mapping[str, Any], known: list[str]) -> set[str]:
    names = {strict_yaml.text(name, "pcap") for name in strict_yaml.items(value.get("pcap", []), "pcap")}
    for name in sorted(names.difference(known)):
        raise SpecError(f"pcap: no link {name[:40]!r}{did_you_mean(name, known)}")
    return names


def _profiles(value: Mapping[str, Any], kind: str, known: list[str]) -> dict[str, Any]:
    given = value.get("profiles", {})
    if not isinstance(given, Mapping):
        raise SpecError("profiles: expected a mapping of links' names to profiles")
    for name in given:
        if name not in known:
            raise SpecError(f"profiles: no link {str(name)[:40]!r}{did_you_mean(str(name), known)}")
    if "bottleneck" in value:
        if kind != "shared-bottleneck":
            raise SpecError(f"bottleneck: a {kind} has none")
        if "bottleneck" in given:
            raise SpecError("profiles.bottleneck: given as bottleneck, too")
        return {"bottleneck": value["bottleneck"], **given}
    return dict(given)


MAX_NODES = 1000
MAX_LINKS = 4000
KEYS = {"name", "nodes", "links", "ipv6"}
LINK_KEYS = {"name", "a", "b", "profile", "congestion", "pcap"}
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
    """Two nodes' connection; *up* is from `a` to `b`. `congestion`: None for the kernel's default.
    `pcap`: whether the packets at both of its ends are captured to files."""

    name: str
    a: str
    b: str
    profile: Profile
    congestion: str | None = None
    pcap: bool = False


@dataclass(frozen=True)
class Topology:
    """Raises SpecError where the nodes and links do not make one connected network."""

    name: str
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    ipv6: bool = True

    def __post_init__(self) -> None:
        _validate(self)

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
            name, f"nodes[{place}]", _NODE_NAME, "start with a letter, then up to 31 of a-z, 0-9 and hyphens"
        )
        if name in _RESERVED:
            raise SpecError(f"nodes[{place}]: a node cannot be called {name!r}: {_RESERVED[name]}")
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


def load_topology(name_or_path: str | Path) -> Topology:
    """The topology of a file, or of the shipped file of that name (``edge-cloud``). Raises SpecError naming
    file and place."""
    path = _find(name_or_path)
    with lookup.beside(path):
        return topology_from(strict_yaml.read(path), str(path), path.stem)


def shipped_topologies() -> list[Path]:
    """The topology files that come with the testbed, and those in ``topologies/`` of the current
    directory."""
    folders = (Path(_FOLDER), Path(__file__).parents[2] / _FOLDER)
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
    if path.exists():
        raise SpecError(f"{path}: a directory or a pipe, not a topology file")
    raise SpecError(f"no topology {str(path)!r}{did_you_mean(path.name, list(shipped)) if shipped else ''}")


def topology_from(value: Any, where: str, name: str) -> Topology:
    """The topology a YAML mapping describes. Raises SpecError beginning with `where`."""
    try:
        if isinstance(value, Mapping) and "kind" in value:
            value = unfold(value)
        strict_yaml.mapping(value, "", KEYS, {"nodes", "links"})
        nodes = tuple(
            Node(strict_yaml.text(node, f"nodes[{place}]"))
            for place, node in enumerate(strict_yaml.items(value["nodes"], "nodes"))
        )
        links = tuple(
            _link(link, f"links[{place}]")
            for place, link in enumerate(strict_yaml.items(value["links"], "links"))
        )
        name = strict_yaml.text(value.get("name", name), "name")
        return Topology(name, nodes, links, strict_yaml.truth(value.get("ipv6", True), "ipv6"))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def to_mapping(topology: Topology) -> dict[str, Any]:
    """What `topology_from` makes the same topology of, in full: every node and link listed."""
    links = []
    for link in topology.links:
        values: dict[str, Any] = {"name": link.name, "a": link.a, "b": link.b, "profile": str(link.profile)}
        values |= {"congestion": link.congestion} if link.congestion is not None else {}
        links.append(values | ({"pcap": True} if link.pcap else {}))
    nodes = [node.name for node in topology.nodes]
    return {"name": topology.name, "ipv6": topology.ipv6, "nodes": nodes, "links": links}


def _link(value: Any, where: str) -> Link:
    strict_yaml.mapping(value, where, LINK_KEYS, {"a", "b", "profile"})
    a, b = strict_yaml.text(value["a"], f"{where}.a"), strict_yaml.text(value["b"], f"{where}.b")
    congestion = value.get("congestion")
    return Link(
        name=strict_yaml.text(value.get("name", f"{a}-{b}"), f"{where}.name"),
        a=a,
        b=b,
        profile=profile_from(value["profile"], f"{where}.profile"),
        congestion=None if congestion is None else strict_yaml.text(congestion, f"{where}.congestion"),
        pcap=strict_yaml.truth(value.get("pcap", False), f"{where}.pcap"),
    )
