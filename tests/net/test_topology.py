"""Topology files, and the addresses and routes that follow from them."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from testbed.errors import SpecError
from testbed.net.profile.profile import PRESETS
from testbed.net.topology.topology import Link, Node, Topology, load_topology, shipped_topologies


def network(*pairs: str) -> Topology:
    """A topology out of links written ``a-b``."""
    links = tuple(Link(pair, *pair.split("-"), PRESETS["wan"]) for pair in pairs)
    names = dict.fromkeys(name for link in links for name in (link.a, link.b))
    return Topology("test", tuple(Node(name) for name in names), links)


def path_taken(topology: Topology, start: str, address: str) -> list[str]:
    """The nodes a packet passes, following each node's routes and nothing else."""
    ends = [end for node in topology.nodes for end in topology.interfaces(node.name)]
    owner = {given: end.node for end in ends for given in (end.address, end.address6)}
    here, path = start, [start]
    target = ipaddress.ip_address(address)
    while owner[address] != here:
        own = [
            end
            for end in topology.interfaces(here)
            if any(target in ipaddress.ip_network(network) for network in (end.network, end.network6))
        ]
        if own:
            here = own[0].peer_node
        else:
            fitting = {
                ipaddress.ip_network(route.destination).prefixlen: route.via
                for route in topology.routes(here)
                if target in ipaddress.ip_network(route.destination)
            }
            here = owner[fitting[max(fitting)]]
        path.append(here)
        assert len(path) <= len(topology.nodes), f"a loop: {path}"
    return path


def addresses_by_name(topology: Topology, node: str, version: int = 4) -> dict[str, str]:
    lines = [line.split() for line in topology.hosts(node).splitlines()]
    return {
        name: address
        for address, name in lines
        if name != "localhost" and ipaddress.ip_address(address).version == version
    }


@pytest.mark.parametrize(
    "topology",
    [
        network("a-b"),
        network("a-r", "b-r", "r-c"),
        network("a-b", "b-c", "c-a"),
        network("a-b", "b-c", "c-d", "d-a", "b-e", "e-f", "f-d"),
        network("a-b", "b-c", "c-d", "d-e", "e-f"),
    ],
)
def test_every_node_reaches_every_other_by_name_on_a_shortest_path(topology: Topology) -> None:
    for start in (node.name for node in topology.nodes):
        hops = {start: 0}
        frontier = [start]
        while frontier:
            here = frontier.pop(0)
            for end in topology.interfaces(here):
                if end.peer_node not in hops:
                    hops[end.peer_node] = hops[here] + 1
                    frontier.append(end.peer_node)
        for version in (4, 6):
            names = addresses_by_name(topology, start, version)
            assert set(names) == set(hops)
            for name, address in names.items():
                assert len(path_taken(topology, start, address)) - 1 == hops[name]


def test_every_address_is_reached_from_everywhere() -> None:
    topology = network("a-b", "b-c", "c-d", "d-a", "b-e", "e-f", "f-d")
    for node in topology.nodes:
        for other in topology.nodes:
            for end in topology.interfaces(other.name):
                assert path_taken(topology, node.name, end.address)[-1] == other.name


def test_a_node_with_several_links_forwards_and_others_do_not() -> None:
    topology = network("a-r", "b-r", "r-c")
    assert [topology.forwards(name) for name in ("a", "b", "r", "c")] == [False, False, True, False]


def test_some_hundred_nodes_have_distinct_addresses_and_a_way_out() -> None:
    topology = network(*(f"hub-n{number}" for number in range(400)))
    addresses = [end.address for node in topology.nodes for end in topology.interfaces(node.name)]
    assert len(set(addresses)) == 800
    assert all(ipaddress.ip_address(address) in ipaddress.ip_network("10.0.0.0/8") for address in addresses)
    assert path_taken(topology, "n0", topology.address("n399")) == ["n0", "hub", "n399"]


def test_a_nodes_address_can_be_asked_for_by_link() -> None:
    topology = network("a-r", "b-r")
    assert topology.address("r") == topology.address("r", "a-r") == "10.0.0.2"
    assert topology.address("r", "b-r") == "10.0.1.2"
    with pytest.raises(SpecError, match="node 'a' is not on link 'b-r'"):
        topology.address("a", "b-r")
    with pytest.raises(SpecError, match="no node 'x'"):
        topology.address("x")


def test_links_can_be_put_under_other_profiles_by_name() -> None:
    topology = network("a-r", "b-r").with_profiles({"b-r": PRESETS["lte"]})
    assert [link.profile.name for link in topology.links] == ["wan", "lte"]
    with pytest.raises(SpecError, match=r"no link 'b-q'; did you mean 'b-r'\?"):
        topology.with_profiles({"b-q": PRESETS["lte"]})


def test_the_shipped_topologies_load_by_name_and_by_path() -> None:
    shipped = {path.stem: path for path in shipped_topologies()}
    assert set(shipped) >= {"edge-cloud", "shared-bottleneck"}
    for name, path in shipped.items():
        assert load_topology(name) == load_topology(path)
        assert path.read_text(encoding="utf-8").startswith("#")
    assert [link.name for link in load_topology("edge-cloud").links] == ["access"]


def test_the_shared_bottleneck_is_one_link_for_both_edges() -> None:
    topology = load_topology("shared-bottleneck")
    cloud = topology.address("cloud")
    for edge in ("edge1", "edge2"):
        assert path_taken(topology, edge, cloud) == [edge, "router", "cloud"]


GOOD = "nodes: [edge, cloud]\nlinks:\n  - {a: edge, b: cloud, profile: 5g-mid}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD.replace("5g-mid", "5g-mdi"),
            r"links\[0\].profile: unknown profile '5g-mdi'; did you mean '5g-mid'",
        ),
        (GOOD.replace("b: cloud", "b: clud"), r"links\[0\].b: unknown node 'clud'; did you mean 'cloud'"),
        (GOOD.replace("b: cloud", "b: edge"), r"links\[0\]: a link from 'edge' to itself"),
        (GOOD + "  - {a: cloud, b: edge, profile: lte}\n", r"links\[1\]: links\[0\] joins"),
        (GOOD.replace("[edge,", "[edge, other,"), "no path from 'edge' to 'other'"),
        (GOOD.replace("[edge,", "[edge, edge,"), r"nodes\[1\]: node 'edge' is named twice"),
        (GOOD.replace("edge", "wire"), "cannot be called 'wire'"),
        (GOOD.replace("edge", "Edge/.."), r"nodes\[0\]: the name"),
        (GOOD.replace("edge", "e" * 40), r"nodes\[0\]: the name"),
        (GOOD.replace("profile:", "profil:"), r"links\[0\]: unknown key 'profil'; did you mean 'profile'"),
        (GOOD.replace(", profile: 5g-mid", ""), r"links\[0\]: profile is missing"),
        (GOOD.replace("5g-mid", "5g-mid, congestion: 'a b'"), r"links\[0\].congestion: 'a b'"),
        (GOOD.replace("[edge, cloud]", "3"), "nodes: expected a list"),
        (GOOD.replace("[edge, cloud]", "[1, cloud]"), r"nodes\[0\]: expected text"),
        (GOOD + "nodes: [a, b]\n", ":4: the key 'nodes' is given twice"),
        ("nodes: &x [a]\nlinks: *x\n", "anchors and aliases"),
        ("nodes: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("nodes: [a\n", "expected"),
        ("[" * 5000, "nested too deeply"),
        ("\x00", "not YAML"),
        ("", "expected a mapping"),
        ("nodes: []\nlinks: []\n", "nodes: 0 of them"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_naming_file_and_place(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=says) as caught:
        load_topology(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "#" * 2_000_000)
    with pytest.raises(SpecError, match="larger than"):
        load_topology(path)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(SpecError, match="did you mean 'edge-cloud'"):
        load_topology("edge-clod")
    with pytest.raises(SpecError, match=r"no topology 'nowhere/x\.yaml'"):
        load_topology("nowhere/x.yaml")
