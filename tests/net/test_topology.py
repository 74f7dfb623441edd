"""Topologies, and the files that describe them: lists, shapes that stand for many nodes, and whatever else a file may say."""

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
from testbed.hosts.address import LOCAL, Address, parse_address
from testbed.net.profile.profile import MEASURED, PRESETS
from testbed.net.topology import files
from testbed.net.topology.files import load_topology, shipped_topologies, topology_from
from testbed.net.topology.topology import Link, Node, Topology

STAR = Topology(
    "star",
    tuple(Node(name) for name in "abr"),
    tuple(Link(f"{leaf}-r", leaf, "r", PRESETS["wan"]) for leaf in "ab"),
)


def test_a_node_with_several_links_forwards_and_others_do_not() -> None:
    assert [STAR.forwards(name) for name in "abr"] == [False, False, True]


def test_a_nodes_address_can_be_asked_for_by_link() -> None:
    assert STAR.address("r") == STAR.address("r", "a-r") == "10.0.0.2"
    assert STAR.address("r", "b-r") == "10.0.1.2"
    with pytest.raises(SpecError, match="node 'a' is not on link 'b-r'"):
        STAR.address("a", "b-r")
    with pytest.raises(SpecError, match="no node 'x'"):
        STAR.address("x")


def test_links_can_be_put_under_other_profiles_by_name() -> None:
    topology = STAR.with_profiles({"b-r": PRESETS["lte"]})
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
        (GOOD.replace("[edge, cloud]", "3"), r"nodes: Input should be a valid list \(got '3'\)"),
        (
            GOOD.replace("[edge, cloud]", "[1, cloud]"),
            r"nodes\[0\]: Input should be a valid string \(got '1'\)",
        ),
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
        "kind": mostly(st.sampled_from([*files.KINDS, "ring"])),
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
def test_whatever_a_file_says_is_a_topology_or_an_error_that_names_the_place(value: Any) -> None:
    try:
        topology_from(value, "x.yaml", "x")
    except SpecError as error:
        assert str(error).startswith("x.yaml: ")
        assert "\n" not in str(error)


@given(st.binary(max_size=200) | st.text(max_size=200) | st.builds(yaml.safe_dump, st.one_of(listed, kinds)))
def test_any_text_is_read_or_refused_in_one_line(text: bytes | str) -> None:
    try:
        topology_from(strict_yaml.parse(text, "x.yaml"), "x.yaml", "x")
    except SpecError as error:
        assert str(error).startswith("x.yaml")
        assert "\n" not in str(error)


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
        (
            {"kind": "ring"},
            r"kind: Input should be 'line', 'star', 'shared-bottleneck' or 'cell' \(got 'ring'\)",
        ),
        ({"nodes": 1001}, "nodes: Input should be less than or equal to 1000"),
        ({"nodes": True}, "nodes: Input should be a valid integer"),
        ({"profiles": {"n9-hub": "lte"}}, "profiles: no link 'n9-hub'"),
        ({"profiles": {"n1-hub": "lt"}}, r"links\[0\].profile: unknown profile 'lt'"),
        ({"bottleneck": "lte"}, "bottleneck: a star has none"),
        ({"links": []}, "unknown key 'links'"),
        ({"ipv6": "yes"}, "ipv6: Input should be a valid boolean"),
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
    models = {
        "generated": files.Shape,
        "listed": files.Listed,
        "link": files.WrittenLink,
        "host": files.WrittenNode,
    }
    for part, model in models.items():
        assert set(schema[part]["properties"]) == set(model.model_fields)
        assert set(schema[part]["required"]) == {k for k, v in model.model_fields.items() if v.is_required()}
    assert set(schema["generated"]["properties"]["kind"]["enum"]) == set(files.KINDS)


HOSTS: dict[str, Any] = {
    "nodes": {
        "edge": {
            "host": "ssh://nvidia@jetson",
            "python": "~/venv/bin/python",
            "device": "cuda",
            "address": "192.168.7.2",
        },
        "cloud": {"host": "ssh://lab@a100:2222", "interface": "eth0"},
    },
    "links": [{"name": "access", "a": "edge", "b": "cloud", "profile": "measured"}],
}


def test_nodes_may_be_machines_of_their_own() -> None:
    made = topology_from(HOSTS, "x", "x")
    assert made.kind == "hosts"
    assert made.node("edge") == Node(
        "edge", Address("jetson", "nvidia"), "~/venv/bin/python", "cuda", None, "192.168.7.2"
    )
    assert made.node("cloud") == Node("cloud", Address("a100", "lab", 2222), interface="eth0")
    assert made.links[0].profile is MEASURED
    assert load_topology("edge-cloud").kind == "namespaces"
    local = topology_from(HOSTS | {"nodes": {**HOSTS["nodes"], "edge": {"host": "local"}}}, "x", "x")
    assert local.node("edge").host == LOCAL


def test_a_host_shapes_its_link_under_a_steady_profile() -> None:
    link = {"a": "edge", "b": "cloud", "profile": "5g-mid", "shape": "edge", "force": True}
    made = topology_from(HOSTS | {"links": [link]}, "x", "x").links[0]
    assert (made.shape, made.force, made.profile) == ("edge", True, PRESETS["5g-mid"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"nodes": {**HOSTS["nodes"], "edge": {"host": "jetson"}}},
            r"nodes\.edge\.host: host 'jetson': write ssh://",
        ),
        (
            {"nodes": {**HOSTS["nodes"], "edge": {"hots": "x"}}},
            "edge: unknown key 'hots'; did you mean 'host'",
        ),
        ({"nodes": {**HOSTS["nodes"], "edge": {}}}, "edge: host is missing"),
        ({"nodes": {**HOSTS["nodes"], "edge": None}}, r"nodes\.edge: Input should be a valid dictionary"),
        ({"nodes": {**HOSTS["nodes"], "edge": {"host": "local", "address": "jetson"}}}, "no IPv4 address"),
        ({"nodes": {**HOSTS["nodes"], "edge": {"host": "local", "python": "-c"}}}, "python"),
        ({"nodes": {**HOSTS["nodes"], "edge": {"host": "ssh://-oProxyCommand=x"}}}, "write ssh://"),
        ({"nodes": ["edge", "cloud"]}, "profile: measured is for links between hosts"),
        ({"profile": "5g-mid"}, r"links\[0\]: .*shape: edge\|cloud"),
        ({"shape": "edge"}, "the link is what it is"),
        ({"profile": "5g-mid", "shape": "hub"}, r"shape: 'hub' is no end of it; write edge or cloud"),
        ({"profile": "sine:5mbit..50mbit*20s", "shape": "edge"}, "steady profile"),
        ({"pcap": True}, "tcpdump"),
    ],
)
def test_what_hosts_cannot_do_is_refused_with_its_place(change: dict[str, Any], complaint: str) -> None:
    of_link = {key: value for key, value in change.items() if key != "nodes"}
    written = HOSTS | {
        "nodes": change.get("nodes", HOSTS["nodes"]),
        "links": [{**HOSTS["links"][0], **of_link}],
    }
    with pytest.raises(SpecError, match=complaint) as refused:
        topology_from(written, "x.yaml", "x")
    assert str(refused.value).startswith("x.yaml: ")
    assert "\n" not in str(refused.value)


def test_machines_and_namespaces_are_not_mixed() -> None:
    with pytest.raises(SpecError, match=r"nodes\.b: host is missing"):
        Topology("t", (Node("a", LOCAL), Node("b")), (Link("l", "a", "b", MEASURED),))


@given(
    st.builds(
        Address,
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True) | st.ip_addresses(v=6).map(str),
        st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}", fullmatch=True),
        st.none() | st.integers(1, 65535),
    )
)
def test_a_hosts_address_reads_back_as_it_is_written(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.text(max_size=40) | st.text(max_size=40).map("ssh://".__add__))
def test_what_is_no_hosts_address_is_refused_by_a_named_error(text: str) -> None:
    try:
        assert parse_address(str(parse_address(text))) == parse_address(text)
    except SpecError as error:
        assert "write ssh://" in str(error)
