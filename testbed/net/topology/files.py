"""Topology files (see ``topologies/``).

Nodes and links are listed::

    nodes: [edge, cloud]
    links:
      - {a: edge, b: cloud, profile: 5g-mid, congestion: cubic}

``name`` of a link is ``a-b`` where it is left out, that of the topology the file's. ``congestion`` names the TCP congestion
control of connections that leave a node by that link; ``pcap: true`` captures its packets; ``ipv6: false`` leaves IPv6 out.

Nodes that are machines of their own are a mapping, and all of them are::

    nodes:
      edge:  {host: ssh://nvidia@jetson, python: ~/testbed/.venv/bin/python, device: cuda, address: 192.168.7.2}
      cloud: {host: ssh://lab@a100:2222, interface: eth0}              host: local: this machine
    links:
      - {name: access, a: edge, b: cloud, profile: measured}           the link is what it is
      - {name: access, a: edge, b: cloud, profile: 5g-mid, shape: edge}    or its edge's host shapes it, both ways

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

    kind: cell                       edge1 ═╗                    links radio-1, radio-2, …, all of one cell: what one gets while
    nodes: 5                         edge2 ═╬═ cloud             others send, too, is up to the scheduler; up: towards the cloud;
    profile: 5g-mid                  edge3 ═╝                    `nodes` counts the cloud, too
    scheduler: proportional-fair

There, `profile` is every link's; ``profiles: {n3-hub: lte}`` puts some under others. ``congestion`` is every link's congestion
control; ``pcap: [n3-hub]`` names links whose packets are captured.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from testbed import lookup, strict_yaml
from testbed.errors import SpecError
from testbed.hosts.address import Address, parse_address
from testbed.net.profile.profile import profile_from
from testbed.net.topology.topology import MAX_NODES, PYTHON, Cell, Link, Node, Topology
from testbed.strict_yaml import did_you_mean

_FOLDER = "topologies"
Named = tuple[list[str], list[tuple[str, str, str]]]
"""Names of nodes, and links as (name, a, b)."""


def line(nodes: int) -> Named:
    """n1 - n2 - n3 - …"""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    return names, [(f"{a}-{b}", a, b) for a, b in itertools.pairwise(names)]


def star(nodes: int) -> Named:
    """A hub, and everybody else on a link of its own to it."""
    leaves = [f"n{number}" for number in range(1, nodes)]
    return ["hub", *leaves], [(f"{leaf}-hub", leaf, "hub") for leaf in leaves]


def shared_bottleneck(nodes: int) -> Named:
    """Edges on access links of their own to a router, from which one link leads to the cloud."""
    edges = [f"edge{number}" for number in range(1, nodes - 1)]
    access = [(f"access-{number}", edge, "router") for number, edge in enumerate(edges, 1)]
    return [*edges, "router", "cloud"], [*access, ("bottleneck", "router", "cloud")]


def cell(nodes: int) -> Named:
    """Edges on radio links of their own to the cloud, which share one medium."""
    edges = [f"edge{number}" for number in range(1, nodes)]
    return [*edges, "cloud"], [(f"radio-{number}", edge, "cloud") for number, edge in enumerate(edges, 1)]


KINDS: dict[str, tuple[Callable[[int], Named], int]] = {
    "line": (line, 2),
    "star": (star, 2),
    "shared-bottleneck": (shared_bottleneck, 3),
    "cell": (cell, 2),
}
"""Name -> the shape, and the fewest nodes it has."""


#: Of a kind, the nodes that are no edges.
_BESIDES = {"star": 1, "shared-bottleneck": 2, "cell": 1}


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _address(value: Any) -> Any:
    return parse_address(value) if isinstance(value, str) else value


def _ipv4(value: Any) -> Any:
    try:
        address = ipaddress.IPv4Address(value)
    except ValueError:
        raise SpecError(f"{str(value)[:40]!r} is no IPv4 address, such as 192.168.7.2") from None
    if address.is_unspecified or address.is_multicast:
        raise SpecError(f"{value} is no address of one interface")
    return str(address)


class WrittenNode(_Written):
    """A node on a machine of its own."""

    host: Annotated[InstanceOf[Address], BeforeValidator(_address)]
    python: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^-\x00-\x1f][^\x00-\x1f]*$")] = (
        PYTHON
    )
    device: Annotated[str, Field(min_length=1)] | None = None
    interface: Annotated[str, Field(pattern=r"^[^\s/\x00]{1,15}$")] | None = None
    address: Annotated[str, BeforeValidator(_ipv4)] | None = None


class WrittenLink(_Written):
    """One link in a list of them."""

    a: str
    b: str
    profile: Any
    name: str | None = None
    congestion: str | None = None
    pcap: bool = False
    shape: str | None = None
    force: bool = False
    cell: str | None = None


class Listed(_Written):
    """Every node and link by itself."""

    nodes: list[str]
    links: list[WrittenLink]
    name: str | None = None
    ipv6: bool = True
    cells: dict[str, str] = {}


class Hosted(Listed):
    """The same, every node on a machine of its own."""

    nodes: dict[str, WrittenNode]  # type: ignore[assignment]


class Shape(_Written):
    """What repeats itself: `profile` is every link's but of those in `profiles`, `congestion` every link's."""

    kind: Literal["line", "star", "shared-bottleneck", "cell"]
    nodes: Annotated[int, Field(ge=2, le=MAX_NODES)]
    profile: Any
    bottleneck: Any = None
    scheduler: str | None = None
    profiles: dict[str, Any] = {}
    congestion: str | None = None
    pcap: list[str] = []
    name: str | None = None
    ipv6: bool = True

    def listed(self) -> Listed:
        """The same with every node and link. Raises SpecError."""
        shape, least = KINDS[self.kind]
        if self.nodes < least:
            raise SpecError(f"nodes: {self.nodes} of them; a {self.kind} has at least {least}")
        names, links = shape(self.nodes)
        if self.scheduler is not None and self.kind != "cell":
            raise SpecError(f"scheduler: a {self.kind} has none")
        known = [name for name, _, _ in links]
        _require(self.profiles, known, "profiles")
        _require(self.pcap, known, "pcap")
        profiles = {**dict.fromkeys(known, self.profile), **self.profiles}
        if self.bottleneck is not None:
            if "bottleneck" not in known:
                raise SpecError(f"bottleneck: a {self.kind} has none")
            if "bottleneck" in self.profiles:
                raise SpecError("profiles.bottleneck: given as bottleneck, too")
            profiles["bottleneck"] = self.bottleneck
        listed = [
            WrittenLink(
                a=a,
                b=b,
                profile=profiles[name],
                name=name,
                congestion=self.congestion,
                pcap=name in self.pcap,
                cell="cell" if self.kind == "cell" else None,
            )
            for name, a, b in links
        ]
        cells = {"cell": self.scheduler or "equal"} if self.kind == "cell" else {}
        return Listed(nodes=names, links=listed, name=self.name, ipv6=self.ipv6, cells=cells)


def _require(names: Iterable[str], known: list[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise SpecError(f"{where}: no link {name[:40]!r}{did_you_mean(name, known)}")


def load_topology(name_or_path: str | Path, edges: int | None = None) -> Topology:
    """The topology of a file, or of the shipped file of that name (``edge-cloud``); edges: a generated one is to have so many
    nodes besides its hub, or router and cloud. Raises SpecError naming file and place."""
    path = _find(name_or_path)
    with lookup.beside(path):
        value = strict_yaml.read(path)
        if edges is not None:
            kind = value.get("kind") if isinstance(value, dict) else None
            if kind not in _BESIDES:
                raise SpecError(
                    f"{path}: so many edges, {edges}, are of a generated topology ({', '.join(_BESIDES)}); name them"
                )
            value = {**value, "nodes": edges + _BESIDES[kind]}
        return topology_from(value, str(path), path.stem)


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
            written = strict_yaml.checked(Shape, value).listed()
        else:
            hosted = isinstance(value, Mapping) and isinstance(value.get("nodes"), Mapping)
            written = strict_yaml.checked(Hosted if hosted else Listed, value)
        links = []
        for place, link in enumerate(written.links):
            called = f"{link.a}-{link.b}" if link.name is None else link.name
            profile = profile_from(link.profile, f"links[{place}].profile")
            links.append(
                Link(
                    called,
                    link.a,
                    link.b,
                    profile,
                    link.congestion,
                    link.pcap,
                    link.shape,
                    link.force,
                    link.cell,
                )
            )
        cells = tuple(Cell(called, str(Cell(called, text).sharing)) for called, text in written.cells.items())
        return Topology(written.name or name, _nodes(written.nodes), tuple(links), written.ipv6, cells)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _nodes(written: dict[str, WrittenNode] | list[str]) -> tuple[Node, ...]:
    if isinstance(written, list):
        return tuple(map(Node, written))
    return tuple(
        Node(name, node.host, node.python, node.device, node.interface, node.address)
        for name, node in written.items()
    )
