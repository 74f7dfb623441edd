"""Routes of any network, against walks and breadth-first search by an independent hand."""

from __future__ import annotations

import functools
import ipaddress
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from testbed.net.profile.presets import PRESETS
from testbed.net.topology import routing
from testbed.net.topology.files import topology_from
from testbed.net.topology.prefixes import aggregate, between, joined, runs
from testbed.net.topology.topology import Link, Node, Topology

network = functools.cache(ipaddress.ip_network)


@st.composite
def networks(draw: Any, circles: bool) -> Topology:
    """Connected, its links in any order and either way round; with `circles`, some more links than a tree has."""
    count = draw(st.integers(2, 12))
    pairs = {(draw(st.integers(0, node - 1)), node) for node in range(1, count)}
    if circles:
        more = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(
            lambda pair: pair[0] < pair[1]
        )
        pairs |= draw(st.sets(more, max_size=4))
    links = []
    for a, b in draw(st.permutations(sorted(pairs))):
        a, b = draw(st.sampled_from([(a, b), (b, a)]))
        links.append(Link(f"l{a}-{b}", f"n{a}", f"n{b}", PRESETS["wan"]))
    return Topology("any", tuple(Node(f"n{number}") for number in range(count)), tuple(links))


def distances(topology: Topology, start: str) -> dict[str, int]:
    """Hops from a node, over all links again and again until nothing gets nearer (Bellman and Ford)."""
    found = {start: 0}
    for _ in topology.nodes:
        for link in topology.links:
            for here, there in ((link.a, link.b), (link.b, link.a)):
                if here in found:
                    found[there] = min(found.get(there, 1000), found[here] + 1)
    return found


class Walks:
    """The ways that packets take through a network."""

    def __init__(self, topology: Topology) -> None:
        ends = [end for each in topology.ends.values() for end in each]
        self.owner = {given: end.node for end in ends for given in (end.address, end.address6)}
        self.topology = topology
        self.routes = functools.cache(topology.routes)

    def walk(self, start: str, address: str) -> list[str]:
        """The nodes that a packet for an address passes: by its own networks, else the longest prefix that fits."""
        target = ipaddress.ip_address(address)
        path = [start]
        while path[-1] != self.owner[address]:
            ends = self.topology.interfaces(path[-1])
            near = [end for end in ends if target in network(end.network) or target in network(end.network6)]
            if near:
                path.append(near[0].peer_node)
            else:
                fitting = [r for r in self.routes(path[-1]) if target in network(r.destination)]
                path.append(self.owner[max(fitting, key=lambda r: network(r.destination).prefixlen).via])
            assert len(path) <= len(self.topology.nodes), f"a loop: {path}"
        return path


@given(networks(circles=False) | networks(circles=True))
def test_packets_take_a_shortest_path_from_anywhere_to_every_link(topology: Topology) -> None:
    walks = Walks(topology)
    for node in topology.nodes:
        away = distances(topology, node.name)
        for link in topology.links:
            # A router knows links, not ends: to the nearer end of the link, and over it where the address is at its other end.
            near = min(away[link.a], away[link.b])
            for end in (link.a, link.b):
                hops = len(walks.walk(node.name, topology.address(end, link.name))) - 1
                assert hops == near or (hops == near + 1 and away[end] >= near)
                assert hops >= away[end]


@given(networks(circles=False) | networks(circles=True))
def test_a_node_knows_every_other_by_the_address_that_is_nearest(topology: Topology) -> None:
    walks = Walks(topology)
    for node in topology.nodes:
        lines = [line.split() for line in topology.hosts(node.name).splitlines()]
        for version in (4, 6):
            named = {
                name: address
                for address, name in lines
                if name != "localhost" and ipaddress.ip_address(address).version == version
            }
            hops = {name: len(walks.walk(node.name, address)) - 1 for name, address in named.items()}
            assert hops == distances(topology, node.name)


@given(networks(circles=False))
def test_a_network_without_circles_is_routed_at_once_as_it_is_node_by_node(topology: Topology) -> None:
    assert topology.tree is not None
    for node in topology.nodes:
        one_by_one = {
            number: way
            for first, last, way in routing._runs(node.name, topology.ends)
            for number in range(first, last + 1)
        }
        at_once = {
            number: way
            for first, last, way in topology.tree.runs(node.name)
            for number in range(first, last + 1)
        }
        assert at_once == one_by_one


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 3), max_size=60))
def test_routes_in_few_prefixes_lead_where_a_route_for_each_would(leaving: dict[int, int]) -> None:
    covered = aggregate(runs(leaving))
    for number, way in leaving.items():
        fitting = [entry for entry in covered if number >> 16 - entry[1] == entry[0] >> 16 - entry[1]]
        assert max(fitting, key=lambda entry: entry[1])[2] == way
    assert len(covered) <= len(leaving)


@given(st.sets(st.integers(0, 40)))
def test_spans_and_what_is_between_them_are_everything_once(numbers: set[int]) -> None:
    spans = joined((number, number) for number in numbers)
    found = [n for first, last in [*spans, *between(spans, 41)] for n in range(first, last + 1)]
    assert sorted(found) == list(range(41))
    assert {n for first, last in spans for n in range(first, last + 1)} == numbers
    assert len(spans) == len([n for n in numbers if n - 1 not in numbers])


def test_a_line_of_a_thousand_reaches_both_of_its_ends_from_its_middle() -> None:
    made = topology_from({"kind": "line", "nodes": 1000, "profile": "lte"}, "x", "x")
    walks = Walks(made)
    ends = made.interfaces("n1000")[0], made.interfaces("n1")[0]
    assert walks.walk("n1", ends[0].address) == [f"n{number}" for number in range(1, 1001)]
    assert walks.walk("n1000", ends[1].address6) == [f"n{number}" for number in range(1000, 0, -1)]
    some = random.Random(1).sample(made.nodes, 20)
    assert all(len(made.routes(node.name)) <= 40 for node in some)
