"""Addresses and routes: how packets get from any node of a topology to any other.

Link number *k* is 10.*k* div 256.*k* mod 256.0/30 and, where the topology has IPv6, fd00:7462:0:*k*::/64 (k in hexadecimal); its
``a`` end is .1 and ::1, its ``b`` end .2 and ::2. Routes are shortest paths by hops, ties going to the link that comes first.

A router does not need a route for each link: `prefixes.aggregate` covers the numbers that leave by the same interface with as few
prefixes as do (a middle node of a line of a thousand needs some twenty), which is why numbers, and not names, are planned.
A network without circles is planned whole (`trees`), any other node by node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.net.topology import prefixes

if TYPE_CHECKING:
    from testbed.net.topology.topology import Link, Topology

PREFIX_BITS = {4: 30, 6: 64}
"""The length of a link's prefix, by IP version."""
_BEFORE_BITS = {4: 8, 6: 48}  # of an address, before the link's number


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
    address6: str = ""  # "fd00:7462::1"; empty without IPv6
    peer6: str = ""
    network6: str = ""


@dataclass(frozen=True)
class Route:
    """What a node does with packets for `destination` ("10.0.3.0/30")."""

    destination: str
    via: str
    interface: str
    link: int  # the number of the link it leads into
    version: int = 4


def interfaces(nodes: Iterator[str], links: tuple[Link, ...], ipv6: bool) -> dict[str, tuple[Interface, ...]]:
    """Every node's ends of its links, in the order of the links: eth0, eth1, …"""
    found: dict[str, list[Interface]] = {node: [] for node in nodes}
    for number, link in enumerate(links):
        network, network6 = _network(number, 4), _network(number, 6) if ipv6 else ""
        stem, stem6 = network.partition("/")[0].removesuffix("0"), network6.partition("/")[0]
        ends = {
            end: (f"{stem}{last}", f"{stem6}{last}" if ipv6 else "") for end, last in (("a", 1), ("b", 2))
        }
        for node, end, other, peer_node in ((link.a, "a", "b", link.b), (link.b, "b", "a", link.a)):
            (address, address6), (peer, peer6) = ends[end], ends[other]
            found[node].append(
                Interface(
                    node,
                    f"eth{len(found[node])}",
                    number,
                    end,
                    address,
                    peer,
                    peer_node,
                    network,
                    address6,
                    peer6,
                    network6,
                )
            )
    return {node: tuple(ends) for node, ends in found.items()}


def _base(number: int, version: int) -> str:
    if version == 4:
        return f"10.{number >> 8}.{number & 255}.0"
    return f"fd00:7462:0:{number:x}::" if number else "fd00:7462::"


def _network(number: int, version: int) -> str:
    return f"{_base(number, version)}/{PREFIX_BITS[version]}"


def first_hops(
    node: str, ends: Mapping[str, tuple[Interface, ...]]
) -> dict[str, tuple[Interface, Interface]]:
    """Other node -> (the interface to leave by, the other node's interface that packets arrive at), nearest first."""
    found: dict[str, tuple[Interface, Interface]] = {}
    queue: deque[tuple[str, Interface | None]] = deque([(node, None)])
    while queue:
        here, first = queue.popleft()
        for interface in ends[here]:
            there = interface.peer_node
            if there == node or there in found:
                continue
            arrival = next(other for other in ends[there] if other.link == interface.link)
            found[there] = (first or interface, arrival)
            queue.append((there, first or interface))
    return found


def routes(node: str, topology: Topology) -> tuple[Route, ...]:
    """The node's routes to all links it is not on itself; one for all of them where it has a single link. None covers addresses
    beyond the links', such as those of the host's name servers."""
    own = topology.interfaces(node)
    versions = (4, 6) if topology.ipv6 else (4,)
    if len(own) == 1:
        if len(topology.links) == 1:
            return ()
        bits = prefixes.BITS - (len(topology.links) - 1).bit_length()
        return tuple(_route(own[0], 0, bits, version) for version in versions)
    runs = topology.tree.runs(node) if topology.tree is not None else _runs(node, topology)
    covered = prefixes.aggregate(runs, len(topology.links))
    return tuple(
        _route(own[place], number, bits, version) for version in versions for number, bits, place in covered
    )


def _runs(node: str, topology: Topology) -> list[prefixes.Run]:
    own = topology.interfaces(node)
    hops = first_hops(node, topology.ends)
    order = {name: place for place, name in enumerate(hops)}  # nearest first
    attached = {interface.link for interface in own}
    places = {interface.name: place for place, interface in enumerate(own)}
    leaving: dict[int, int] = {}  # link number -> the place of the interface that leads there
    for number, link in enumerate(topology.links):
        if number not in attached:
            nearest = link.a if order[link.a] < order[link.b] else link.b
            leaving[number] = places[hops[nearest][0].name]
    return prefixes.runs(leaving)


def _route(out: Interface, number: int, bits: int, version: int) -> Route:
    length = _BEFORE_BITS[version] + bits if bits < prefixes.BITS else PREFIX_BITS[version]
    destination = f"{_base(number, version)}/{length}"
    return Route(destination, out.peer if version == 4 else out.peer6, out.name, out.link, version)


def hosts(node: str, topology: Topology) -> str:
    """The text of /etc/hosts as `node` should see it: every node by the addresses at which its packets arrive there."""
    first = topology.interfaces(node)[0]
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    named = {node: first} | {
        name: arrival for name, (_, arrival) in sorted(first_hops(node, topology.ends).items())
    }
    lines += [f"{interface.address} {name}" for name, interface in named.items()]
    lines += [f"{interface.address6} {name}" for name, interface in named.items() if interface.address6]
    return "\n".join(lines) + "\n"
