"""Links between machines of their own: what they are measured as, and what a host of such a topology has to be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import EndpointError, NetworkError, SpecError, UsageError
from testbed.hosts.address import LOCAL, parse_address
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import MEASURED, parse_profile
from testbed.net.real.real import Real
from testbed.net.topology.topology import Link, Node, Topology
from tests.command import command
from tests.hosts import bench as benches
from tests.hosts.bench import bench

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]

UNDER = "up:rate=20mbit,delay=20ms;down:rate=40mbit,delay=20ms"
EMULATED = Topology(
    "under", (Node("edge"), Node("cloud")), (Link("access", "edge", "cloud", parse_profile(UNDER)),)
)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """Two hosts, and between them an emulated link, which they know nothing of."""
    with (
        Fabric.build(EMULATED, "userspace") as fabric,
        bench({node: fabric.namespace(node) for node in ("edge", "cloud")}) as hosts,
    ):
        nodes = (
            Node("edge", parse_address(hosts["edge"].url), sys.executable, address=fabric.address("edge")),
            Node("cloud", parse_address(hosts["cloud"].url), sys.executable, interface="eth0"),
        )
        yield Topology("real", nodes, (Link("access", "edge", "cloud", MEASURED),))


@pytest.mark.slow
def test_the_command_line_measures_what_lies_between_hosts(topology: Topology, tmp_path: Path) -> None:
    nodes = {
        node.name: {"host": str(node.host), "python": node.python, "address": EMULATED.address(node.name)}
        for node in topology.nodes
    }
    link = {"name": "access", "a": "edge", "b": "cloud", "profile": "measured"}
    (tmp_path / "real.yaml").write_text(json.dumps({"nodes": nodes, "links": [link]}))
    told = command("calibrate", str(tmp_path / "real.yaml"), "--json")
    assert told.status == 0, told.errors
    (measured,) = json.loads(told.out)["calibrations"]
    assert (measured["link"], measured["profile"], measured["emulator"]) == ("access", "measured", "real")


@pytest.mark.slow
def test_a_link_between_hosts_is_measured_as_what_it_is_and_not_judged(topology: Topology) -> None:
    with Real.open(topology) as real:
        assert real.address("cloud", "access") == EMULATED.address("cloud")
        measured = real.calibrate("access", MEASURED)
    found: dict[tuple[str, str], Any] = {(check.way, check.what): check for check in measured.checks}
    print(*measured.lines(), sep="\n")
    assert measured.ok
    assert {check.ok for check in measured.checks} == {None}
    assert found["up", "rate"].measured == pytest.approx(20e6, rel=0.05)
    assert found["down", "rate"].measured == pytest.approx(40e6, rel=0.05)
    assert 40e-3 <= found["both", "round trip"].measured < 60e-3
    for way in ("up", "down"):  # whose one-way delay is within what is said of it, where anything is
        if check := found.get((way, "delay")):
            assert check.low - 1e-3 <= 20e-3 <= check.high
        assert found[way, "loss"].n > 100
    plain = json.loads(json.dumps(measured.to_dict()))["attempts"][0]
    assert {(course["way"], course["what"]) for course in plain["courses"]} == {
        (way, what) for way in ("up", "down") for what in ("rate", "excess delay")
    }


def test_an_interface_or_address_that_a_host_has_not_is_named_with_those_that_it_has(
    topology: Topology,
) -> None:
    edge, cloud = topology.nodes
    with pytest.raises(
        NetworkError, match=rf"node cloud: no interface eth7 .*eth0 {EMULATED.address('cloud')}"
    ):
        Real.open(replace(topology, nodes=(edge, replace(cloud, interface="eth7"))))
    other = replace(topology, nodes=(replace(edge, address="192.0.2.1"), cloud))
    with (
        Real.open(other) as real,
        pytest.raises(NetworkError, match=r"node edge: cannot listen at 192\.0\.2\.1"),
    ):
        real.calibrate("access", MEASURED)


def test_without_either_a_nodes_data_comes_where_ssh_does(topology: Topology) -> None:
    edge, cloud = topology.nodes
    with Real.open(replace(topology, nodes=(replace(edge, address=None), cloud))) as real:
        assert edge.host is not None
        assert real.address("edge") == edge.host.name
        told = real.described()["edge"]
        assert (told["host"], told["kind"], told["address"]) == (str(edge.host), "ssh", edge.host.name)
        assert "ptp" in told["clock"] and told["interfaces"]["eth0"]["address"] == EMULATED.address("edge")
    with pytest.raises(SpecError, match="node edge: is this machine; say by address: or interface:"):
        Real.open(replace(topology, nodes=(Node("edge", LOCAL), cloud)))


def test_a_host_that_cannot_be_reached_is_one_line(topology: Topology) -> None:
    edge, cloud = topology.nodes
    assert edge.host is not None
    silent = replace(edge, host=replace(edge.host, port=1))
    with pytest.raises(EndpointError, match=f"{edge.host.name}:1") as refused:
        Real.open(replace(topology, nodes=(silent, cloud)))
    assert "\n" not in str(refused.value)


def test_a_host_that_is_to_shape_says_what_that_takes(topology: Topology) -> None:
    """Its user is not root, and there may be no sudo."""
    link = Link("access", "edge", "cloud", parse_profile("rate=10mbit,delay=10ms"), shape="cloud")
    with (
        pytest.raises(UsageError, match="shaping eth0: takes root there, or sudo without a password"),
        Real.open(replace(topology, links=(link,))),
    ):
        pass
