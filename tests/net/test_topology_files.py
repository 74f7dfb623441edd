"""Topology files: the shapes that stand for many nodes, and whatever else a file may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed import strict_yaml
from testbed.errors import SpecError
from testbed.net.profile.profile import PRESETS
from testbed.net.topology import topology
from testbed.net.topology.prefixes import aggregate, runs
from testbed.net.topology.topology import to_mapping, topology_from

names = st.sampled_from(["a", "b", "hub", "n1", "n-2", "wire", "A", "", "x" * 40, "é", "1"])
profiles = st.sampled_from(
    [*PRESETS, "rate=1mbit", "up:lte;down:wan", "nonsense", "rate=", {"rate": "1mbit"}, {}, 3]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | names,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | names, inner, max_size=4)
    ),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What belongs there, and now and then anything."""
    return st.one_of(usual, usual, usual, usual, junk)


link = st.fixed_dictionaries(
    {"a": mostly(names), "b": mostly(names), "profile": mostly(profiles)},
    optional={"name": mostly(names), "congestion": mostly(st.just("cubic")), "pcap": mostly(st.booleans())},
)
listed = st.fixed_dictionaries(
    {
        "nodes": mostly(st.lists(mostly(names), max_size=5)),
        "links": mostly(st.lists(mostly(link), max_size=5)),
    },
    optional={"name": mostly(names), "ipv6": mostly(st.booleans()), "other": junk},
)
kinds = st.fixed_dictionaries(
    {
        "kind": mostly(st.sampled_from([*topology.KINDS, "ring"])),
        "nodes": mostly(st.integers(-1, 40)),
        "profile": mostly(profiles),
    },
    optional={
        "bottleneck": mostly(profiles),
        "profiles": mostly(
            st.dictionaries(st.sampled_from(["n1-hub", "n1-n2", "x"]), mostly(profiles), max_size=2)
        ),
        "ipv6": mostly(st.booleans()),
        "congestion": mostly(st.just("cubic")),
        "pcap": mostly(st.lists(st.sampled_from(["n1-hub", "x"]), max_size=2)),
        "name": mostly(names),
    },
)


@given(st.one_of(listed, kinds, junk))
def test_whatever_a_file_says_is_a_topology_that_round_trips_or_an_error_that_names_the_place(
    value: Any,
) -> None:
    try:
        made = topology_from(value, "x.yaml", "x")
    except SpecError as error:
        assert str(error).startswith("x.yaml: ")
        assert "\n" not in str(error)
        return
    again = yaml.safe_dump(to_mapping(made))
    assert topology_from(strict_yaml.parse(again, "y"), "y", "y") == made


@given(st.binary(max_size=200) | st.text(max_size=200) | st.builds(yaml.safe_dump, st.one_of(listed, kinds)))
def test_any_text_is_read_or_refused_in_one_line(text: bytes | str) -> None:
    try:
        topology_from(strict_yaml.parse(text, "x.yaml"), "x.yaml", "x")
    except SpecError as error:
        assert str(error).startswith("x.yaml")
        assert "\n" not in str(error)


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 3), max_size=60))
def test_routes_in_few_prefixes_lead_where_a_route_for_each_would(leaving: dict[int, int]) -> None:
    covered = aggregate(runs(leaving))
    for number, way in leaving.items():
        fitting = [entry for entry in covered if number >> 16 - entry[1] == entry[0] >> 16 - entry[1]]
        assert max(fitting, key=lambda entry: entry[1])[2] == way
    assert len(covered) <= len(leaving)


@pytest.mark.parametrize(
    ("value", "nodes", "links"),
    [
        ({"kind": "line", "nodes": 3}, ["n1", "n2", "n3"], ["n1-n2", "n2-n3"]),
        ({"kind": "star", "nodes": 3}, ["hub", "n1", "n2"], ["n1-hub", "n2-hub"]),
        (
            {"kind": "shared-bottleneck", "nodes": 4, "bottleneck": "wan"},
            ["edge1", "edge2", "router", "cloud"],
            ["access-1", "access-2", "bottleneck"],
        ),
    ],
)
def test_a_kind_stands_for_nodes_and_links(value: dict[str, Any], nodes: list[str], links: list[str]) -> None:
    made = topology_from(value | {"profile": "lte"}, "x", "x")
    assert [node.name for node in made.nodes] == nodes
    assert [one.name for one in made.links] == links
    assert [one.profile.name for one in made.links[:-1]] == ["lte"] * (len(links) - 1)
    assert made.links[-1].profile.name == value.get("bottleneck", "lte")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"kind": "ring"}, "kind: unknown kind 'ring'"),
        ({"nodes": 1001}, "nodes: expected a whole number from 2 to 1000"),
        ({"nodes": True}, "nodes: expected a whole number"),
        ({"profiles": {"n9-hub": "lte"}}, "profiles: no link 'n9-hub'"),
        ({"profiles": {"n1-hub": "lt"}}, r"links\[0\].profile: unknown profile 'lt'"),
        ({"bottleneck": "lte"}, "bottleneck: a star has none"),
        ({"links": []}, "unknown key 'links'"),
        ({"ipv6": "yes"}, "ipv6: expected true or false"),
        ({"pcap": ["n7-hub"]}, "pcap: no link 'n7-hub'"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused_by_its_place(value: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=f"x.yaml: {says}"):
        topology_from({"kind": "star", "nodes": 3, "profile": "wan"} | value, "x.yaml", "x")


@pytest.mark.parametrize("kind", ["line", "star", "shared-bottleneck"])
def test_a_thousand_nodes_have_addresses_of_their_own_and_few_routes(kind: str) -> None:
    made = topology_from({"kind": kind, "nodes": 1000, "profile": "lte"}, "x", "x")
    ends = [end for node in made.nodes for end in made.interfaces(node.name)]
    assert len({end.address for end in ends}) == len({end.address6 for end in ends}) == 2 * 999
    for node in (made.nodes[0], made.nodes[1], made.nodes[500], made.nodes[-1]):
        assert len(made.routes(node.name)) <= 2 * 2 * 10  # two ways out, ten bits, two families


def test_the_schema_knows_the_keys_that_files_may_have() -> None:
    schema = json.loads((Path(__file__).parents[2] / "topologies/schema.json").read_text())["$defs"]
    assert set(schema["generated"]["properties"]) == topology.REPEATED_KEYS
    assert set(schema["listed"]["properties"]) == topology.KEYS
    assert set(schema["link"]["properties"]) == topology.LINK_KEYS
    assert set(schema["generated"]["properties"]["kind"]["enum"]) == set(topology.KINDS)
