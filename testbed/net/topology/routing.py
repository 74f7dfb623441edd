"""Addresses and routes: how packets get from any node of a topology to any other.

Link number *k* is 10.*k* div 256.*k* mod 256.0/30 and, where the topology has IPv6, fd00:7462:0:*k*::/64 (k in hexadecimal); its
``a`` end is .1 and ::1, its ``b`` end .2 and ::2. Routes are shortest paths by hops, ties going to the link that comes first.

A router does not need a route for each link: `prefixes.aggregate` covers the numbers that leave by the same interface with as few
prefixes as do (a middle node of a line of a thousand needs some twenty), which is why numbers, and not names, are planned.
A network without circles is planned whole (`Tree`), any other node by node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from testbed.net.topology import prefixes

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


Ends = Mapping[str, tuple[Interface, ...]]
"""Every node's ends of its links."""


@dataclass(frozen=True)
class Route:
    """What a node does with packets for `destination` ("10.0.3.0/30")."""

    destination: str
    via: str
    interface: str
    link: int  # the number of the link it leads into
    version: int = 4


def interfaces(
    nodes: Iterable[str], links: Sequence[tuple[str, str]], ipv6: bool
) -> dict[str, tuple[Interface, ...]]:
    """Every node's ends of its links (their ``a`` and ``b``), in the order of the links: eth0, eth1, …"""
    found: dict[str, list[Interface]] = {node: [] for node in nodes}
    for number, (a, b) in enumerate(links):
        network, network6 = _network(number, 4), _network(number, 6) if ipv6 else ""
        stem, stem6 = network.partition("/")[0].removesuffix("0"), network6.partition("/")[0]
        ends = {
            end: (f"{stem}{last}", f"{stem6}{last}" if ipv6 else "") for end, last in (("a", 1), ("b", 2))
        }
        for node, end, other, peer_node in ((a, "a", "b", b), (b, "b", "a", a)):
            (address, address6), (peer, peer6) = ends[end], ends[other]
            addresses = (address, peer, peer_node, network, address6, peer6, network6)
            found[node].append(Interface(node, f"eth{len(found[node])}", number, end, *addresses))
    return {node: tuple(ends) for node, ends in found.items()}


def _base(number: int, version: int) -> str:
    if version == 4:
        return f"10.{number >> 8}.{number & 255}.0"
    return f"fd00:7462:0:{number:x}::" if number else "fd00:7462::"


def _network(number: int, version: int) -> str:
    return f"{_base(number, version)}/{PREFIX_BITS[version]}"


def first_hops(node: str, ends: Ends) -> dict[str, tuple[Interface, Interface]]:
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


def routes(node: str, ends: Ends, tree: Tree | None, ipv6: bool) -> tuple[Route, ...]:
    """The node's routes to all links it is not on itself; one for all of them where it has a single link. None covers addresses
    beyond the links', such as those of the host's name servers. *tree*: the network's, where it has no circle."""
    own, links = ends[node], sum(map(len, ends.values())) // 2
    versions = (4, 6) if ipv6 else (4,)
    if len(own) == 1:
        if links == 1:
            return ()
        bits = prefixes.BITS - (links - 1).bit_length()
        return tuple(_route(own[0], 0, bits, version) for version in versions)
    covered = prefixes.aggregate(tree.runs(node) if tree is not None else _runs(node, ends), links)
    return tuple(
        _route(own[place], number, bits, version) for version in versions for number, bits, place in covered
    )


def _runs(node: str, ends: Ends) -> list[prefixes.Run]:
    places = {interface.name: place for place, interface in enumerate(ends[node])}
    attached = {interface.link for interface in ends[node]}
    leaving: dict[
        int, int
    ] = {}  # link number -> the place of the interface that leads to the nearer of its ends
    for name, (first, _) in first_hops(node, ends).items():
        for interface in ends[name]:
            if interface.link not in attached:
                leaving.setdefault(interface.link, places[first.name])
    return prefixes.runs(dict(sorted(leaving.items())))


def _route(out: Interface, number: int, bits: int, version: int) -> Route:
    length = _BEFORE_BITS[version] + bits if bits < prefixes.BITS else PREFIX_BITS[version]
    destination = f"{_base(number, version)}/{length}"
    return Route(destination, out.peer if version == 4 else out.peer6, out.name, out.link, version)


def hosts(node: str, ends: Ends) -> str:
    """The text of /etc/hosts as `node` should see it: every node by the addresses at which its packets arrive there."""
    first = ends[node][0]
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    named = {node: first} | {name: arrival for name, (_, arrival) in sorted(first_hops(node, ends).items())}
    lines += [f"{interface.address} {name}" for name, interface in named.items()]
    lines += [f"{interface.address6} {name}" for name, interface in named.items() if interface.address6]
    return "\n".join(lines) + "\n"


Spans = list[tuple[int, int]]


class Tree:
    """Routes of a network without circles: one that has one link fewer than nodes, all of which hang together.

    Seen from any node, every link lies behind exactly one of its own. So, from the first node down, it is known of each node
    which links lie below it; all others lie above. Links below are kept as spans of numbers, one for each node of a line.
    """

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._links = len(ends) - 1
        self._above: dict[str, str] = {}  # node -> the one nearer to the first
        self._below: dict[str, Spans] = {}  # node -> the numbers of the links that lie below it
        first = next(iter(ends))
        order = [first]
        for node in order:  # grows as it goes
            for interface in ends[node]:
                if interface.peer_node != self._above.get(node):
                    self._above[interface.peer_node] = node
                    order.append(interface.peer_node)
        for node in reversed(order):
            children = [end for end in ends[node] if end.peer_node != self._above.get(node)]
            spans = [(end.link, end.link) for end in children]
            for end in children:
                spans += self._below[end.peer_node]
            self._below[node] = prefixes.joined(spans)

    def runs(self, node: str) -> list[prefixes.Run]:
        """The links that the node is not on itself: by which of its interfaces (their places) packets for them leave."""
        found: list[prefixes.Run] = []
        for place, end in enumerate(self._ends[node]):
            if end.peer_node == self._above.get(node):
                # All links but this one and those above are below.
                nearer = prefixes.joined([*self._below[node], (end.link, end.link)])
                found += [(first, last, place) for first, last in prefixes.between(nearer, self._links)]
            else:
                found += [(first, last, place) for first, last in self._below[end.peer_node]]
        return sorted(found)
