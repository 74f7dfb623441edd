"""Scenarios of loads: who asks, over which link, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.errors import SpecError
from testbed.experiment import allocation
from testbed.experiment.edges import MOST
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan

BASE = {
    "name": "t",
    "topology": "star",
    "cloud": "hub",
    "edges": "n*",
    "profiles": ["rate=50mbit,delay=5ms"],
    "tasks": ["needle"],
    "codecs": ["int4"],
    "load": "closed(think=1s)",
    "model": "shape:llama-3.1-8b",
    "compute": {"edge": "device:m1-max-llama-3.1-8b", "cloud": "device:rtx-4090-llama-3.1-8b"},
}


def plan(**changes: Any) -> Plan:
    settings = {**BASE, **changes}
    return make_plan({key: value for key, value in settings.items() if value is not None}, "t.yaml")


def identity(made: Plan) -> str:
    return made.cells(0, 256)[0].identity(made)


@pytest.mark.parametrize(
    ("edges", "names"),
    [
        ("n*", [f"n{number}" for number in range(1, 10)]),
        ("n[12]", ["n1", "n2"]),
        (["n3", "n1"], ["n1", "n3"]),
        (3, ["n1", "n2", "n3"]),
        (64, [f"n{number}" for number in range(1, 65)]),
    ],
)
def test_edges_are_a_pattern_names_or_a_number_that_the_topology_then_has(
    edges: Any, names: list[str]
) -> None:
    made = plan(edges=edges)
    assert [edge.node for edge in made.edges] == names
    assert [edge.link for edge in made.edges] == [f"{name}-hub" for name in names]


def test_edges_behind_one_bottleneck_share_what_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "{kind: shared-bottleneck, nodes: 12, profile: 5g-good, bottleneck: 'rate=60mbit,delay=5ms'}"
    )
    made = plan(topology=str(path), cloud="cloud", edges=4)
    assert (made.link, made.own_links, len(made.edges)) == ("bottleneck", False, 4)
    assert made.edges[3].link == "access-4"
    assert made.under(made.profiles[0]).link("bottleneck").profile == made.profiles[0]
    assert made.under(made.profiles[0]).link("access-1").profile != made.profiles[0]


def test_what_is_an_edges_own_goes_before_a_patterns_and_that_before_the_cells() -> None:
    made = plan(edges={"n*": {"codec": "int8"}, "n2": {"profile": "lte"}}, codecs=["fp16"])
    cell = made.cells(0, 256)[0]
    codecs = {edge.node: str(made.at_edge(cell, edge).codec) for edge in made.edges}
    assert codecs["n1"] == "int8" and codecs["n2"] == "fp16"
    conditions = made.conditions(cell.profile)
    assert conditions["n2-hub"].name == "lte" and conditions["n1-hub"] == cell.profile
    assert "int8" in map(str, made.codecs)


OWN = {
    "model": "shape:qwen2.5-3b",
    "compute": {"edge": "device:phone", "cloud": "device:phone"},
    "delivery": "stream(chunk=64)",
}


def device(path: Path, model: str) -> str:
    path.write_text(
        f"{{device: {path.stem}, model: {model}, dtype: float16, basis: measured, source: here, "
        "prefill: [[16, 20ms], [512, 40ms]], decode: [[16, 5ms], [512, 6ms]]}"
    )
    return f"device:{path}"


def test_an_edge_may_have_a_model_devices_and_a_delivery_of_its_own(tmp_path: Path) -> None:
    phone = device(tmp_path / "phone.yaml", "qwen2.5-3b")
    own = {**OWN, "compute": {"edge": phone, "cloud": phone}}
    made = plan(edges={"n1": None, "n2": own, "n3": {"delivery": "stream(chunk=64)"}})
    cell = made.cells(0, 256)[0]
    first, second, third = made.edges
    assert (first.computed, third.computed) == ("", "") != second.computed
    assert made.of_edge(first) == made and made.models == ["shape:llama-3.1-8b", "shape:qwen2.5-3b"]
    theirs = made.of_edge(second)
    assert theirs.scenario.models.cloud == "shape:qwen2.5-3b"
    assert {side: found.name for side, found in theirs.devices.items()} == {"edge": "phone", "cloud": "phone"}
    assert str(first) == "n1" and str(third) == "n3 (delivery stream(chunk=64))"
    told = "delivery stream(chunk=64), model shape:qwen2.5-3b, compute phone / phone"
    assert str(second) == f"n2 ({told})"
    assert [str(made.at_edge(cell, edge).delivery) for edge in made.edges] == [
        "whole",
        "stream(chunk=64)",
        "stream(chunk=64)",
    ]
    assert identity(made) != identity(plan(edges=["n1", "n2", "n3"]))
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert again.scenario == made.scenario and again.edges == made.edges
    # The same model by another name is no other.
    same = plan(edges={"n1": {"model": "shape:llama-3.1-8b"}})
    assert identity(same) == identity(plan(edges=["n1"]))


def test_a_plan_is_the_same_when_it_is_read_back_from_its_manifest() -> None:
    made = plan(
        edges={"n1": {"profile": "lte", "codec": "int8"}, "n2": None}, serving="batch(max=4)", warmup="2s"
    )
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert again.scenario == made.scenario and again.edges == made.edges
    assert identity(again) == identity(made)


@pytest.mark.parametrize(
    "change",
    [
        {"load": "poisson(rate=2/s)"},
        {"serving": "shortest"},
        {"edges": "n[12]"},
        {"edges": {"n*": {"codec": "int8"}}},
        {"duration": "10s"},
        {"warmup": "1s"},
    ],
)
def test_a_cell_is_another_where_anything_of_its_load_is(change: dict[str, Any]) -> None:
    assert identity(plan(**change)) != identity(plan())


def test_a_file_of_arrivals_is_found_and_known_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "came.txt"
    path.write_text("0\n1\n")
    before = identity(plan(load=f"arrivals:{path}"))
    path.write_text("0\n2\n")
    assert identity(plan(load=f"arrivals:{path}")) != before
    path.write_text("0 hub\n")
    with pytest.raises(SpecError, match=r"t.yaml: load: .*came.txt: line 1: there is no edge 'hub'"):
        plan(load=f"arrivals:{path}")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"load": None}, r"t.yaml: edges: is of a load, such as load: closed\(think=1s\), and there is none"),
        ({"load": None, "edges": None, "serving": "shortest"}, r"t.yaml: serving: shortest: nobody waits"),
        ({"load": ["sequential", "closed"]}, r"t.yaml: load: sequential beside others"),
        ({"load": ["closed", "closed"]}, r"t.yaml: load: 'closed' is listed twice"),
        ({"edges": "m*"}, r"t.yaml: edges: topology star has no node 'm\*'; it has hub, n1"),
        ({"edges": "hub"}, r"t.yaml: edges: 'hub' is the cloud"),
        ({"edges": MOST + 1}, r"t.yaml: edges: 65 edges; this machine runs 1 to 64"),
        ({"edges": {"n1": {"codek": "int8"}}}, r"t.yaml: edges.*: unknown key 'codek'; did you mean 'codec'"),
        ({"edges": {"n1": {"profile": "6g"}}}, r"t.yaml: edges.n1.profile: unknown profile '6g'"),
        (
            {"edges": 3, "topology": "edge-cloud", "cloud": "cloud"},
            r"so many edges, 3, are of a generated topology",
        ),
        (
            {"placements": ["edge"]},
            r"t.yaml: placements: edge under a load; there it takes split, store, cloud",
        ),
        ({"delivery": "meet"}, r"t.yaml: delivery: meet under a load; there it takes whole, stream"),
        (
            {"delivery": "progressive(planes=3)", "codecs": ["int4"]},
            r"t.yaml: delivery: progressive\(planes=3\) under a load; there it takes whole, stream",
        ),
        (
            {"delivery": "adaptive(deadline=1s, levels=[int8, int4])"},
            r"t.yaml: delivery: adaptive under a load: each level has to lie at the edge before; write placements: store",
        ),
        (
            {"delivery": "adaptive(levels=[int8, text])", "placements": ["store"]},
            r"t.yaml: delivery: adaptive under a load: level text would be computed in the cloud behind others' requests",
        ),
        (
            {"delivery": "adaptive(levels=[int8, q2c@0.5+int4])", "placements": ["store"]},
            r"t.yaml: delivery: adaptive under a load: level q2c@0.5\+int4 chooses tokens",
        ),
        (
            {"delivery": "adaptive(levels=[int8, int4], policy=oracle)", "placements": ["store"]},
            r"t.yaml: delivery: adaptive under a load: policy oracle is told a rate, which others share",
        ),
        (
            {"load": "rounds(every=100s)", "warmup": "5s"},
            r"t.yaml: load: rounds\(every=100s\): nobody asks from 5s to",
        ),
        ({"load": "poisson(rate=0.0001/s)"}, r"t.yaml: load: poisson\(.*: nobody asks from 0ms to 60s"),
        ({"load": "poisson(rate=99999/s)"}, r"t.yaml: load: .* an episode has at most 200,000"),
        (
            {"edges": {"n1": {"codec": "int8+zstd"}}},
            r"t.yaml: edges.n1.codec: 'int8\+zstd': what coder zstd makes of a cache depends on its values",
        ),
        (
            {"edges": {"n1": {"model": "shape:qwen2.5-3b"}}},
            r"t.yaml: edges.n1: compute.edge: device m1-max-llama-3.1-8b was measured for model llama-3.1-8b",
        ),
        ({"edges": {"n1": {"model": "shape:nobody"}}}, r"t.yaml: edges.n1: .*nobody"),
        (
            {"edges": {"n1": {"compute": {"edge": "device:none-such"}}}},
            r"t.yaml: edges.n1: compute.edge: .*none-such",
        ),
        (
            {"edges": {"n1": {"delivery": "meet"}}},
            r"t.yaml: edges.n1.delivery: meet under a load; there it takes whole",
        ),
        ({"serving": "lifo"}, r"t.yaml: serving.*: serving 'lifo': unknown; did you mean 'fifo'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        plan(**change)


def test_a_device_that_was_not_measured_decoding_serves_nobody_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "reader.yaml"
    path.write_text(
        "{device: reader, model: llama-3.1-8b, dtype: float16, basis: measured, source: here, "
        "prefill: [[16, 20ms], [512, 40ms]]}"
    )
    compute = {"edge": "device:m1-max-llama-3.1-8b", "cloud": f"device:{path}"}
    with pytest.raises(SpecError, match=r"t.yaml: .*decod"):
        plan(compute=compute, serving="batch(max=4)")


def test_what_asks_for_no_load_keeps_the_identity_that_it_had() -> None:
    alone = plan(load=None, edges=None, topology="edge-cloud", cloud="cloud")
    assert alone.edges == () and alone.cells(0, 256)[0].load.timed is False
    # As hashed by the version before there were loads.
    assert identity(alone) == "c288f2296551"


CELL = {"topology": "cell", "cloud": "cloud", "edges": 4}


def test_loads_meet_a_cell_that_is_shared_out_in_several_ways_one_after_the_other() -> None:
    made = plan(**CELL, allocate=["reserved", "model-aware", "equal"])
    cells = made.cells(0, 256)
    assert [str(cell.allocate) for cell in cells] == ["reserved", "model-aware", "equal"]
    assert len({cell.identity(made) for cell in cells}) == 3
    assert plan(**CELL).cells(0, 256)[0].allocate is None
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert again.scenario == made.scenario


def test_a_cell_is_shared_out_by_what_its_edges_announce_or_as_it_is_written() -> None:
    topology = plan(**CELL).topology
    sizes = {f"radio-{number}": 1000.0 * number for number in range(1, 5)}
    told = {
        text: allocation.shares(allocation.parse(text), topology, sizes)["cell"]
        for text in ("model-aware", "model-aware(bytes=[4b, 3b, 2b, 1b])", "reserved")
    }
    assert told["model-aware"] == "model-aware(bytes=[1000b, 2000b, 3000b, 4000b])"
    assert told["model-aware(bytes=[4b, 3b, 2b, 1b])"] == "model-aware(bytes=[4b, 3b, 2b, 1b])"
    assert told["reserved"] == "reserved"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"topology": "star", "cloud": "hub"}, r"t.yaml: allocate: model-aware: topology star has no cell"),
        (
            {"edges": ["edge1", "edge3"]},
            r"allocate: model-aware: nobody announces what link radio-2 of cell cell",
        ),
        (
            {"allocate": "model-aware(bytes=[1mb])"},
            r"allocate: model-aware: bytes has 1 sizes, and the cell 4",
        ),
        ({"allocate": "fair"}, r"t.yaml: allocate.*: allocate 'fair': unknown"),
        ({"allocate": ["equal", "equal"]}, r"t.yaml: allocate: 'equal' is listed twice"),
        (
            {"load": None, "edges": None, "edge": "edge1", "link": "radio-1"},
            r"t.yaml: allocate: is of a load",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        plan(**{**CELL, "allocate": "model-aware", **change})


def test_a_topology_alone_cannot_go_by_what_is_announced(tmp_path: Path) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text("{kind: cell, nodes: 4, profile: 5g-mid, scheduler: model-aware}")
    with pytest.raises(SpecError, match=r"model-aware: bytes is missing"):
        plan(topology=str(path), cloud="cloud", edges=3)
