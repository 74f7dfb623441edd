"""What a scenario says of loads, looked up and held against what can be put on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from testbed.codecs.spec import CodecSpec
from testbed.delivery.delivery import Delivery
from testbed.delivery.stream import Stream
from testbed.delivery.whole import Whole
from testbed.errors import SpecError
from testbed.experiment import allocation
from testbed.experiment.devices import needs_values
from testbed.experiment.edges import Edge, Own, matched
from testbed.experiment.handovers import Handover, resolved
from testbed.experiment.scenario import Scenario
from testbed.load.load import Arrival, Load, Open
from testbed.models.shapes import is_shape
from testbed.models.sources import find as find_model
from testbed.net.topology.topology import Topology
from testbed.serving.fifo import Fifo
from testbed.speed.files import Device
from testbed.units import exact_time

#: What crosses a link, or nothing: of a scout there is no ware.
_PLACEMENTS = ("split", "store", "cloud")
_OWN = Own()


def edges_of(scenario: Scenario, topology: Topology, place: str) -> tuple[Edge, ...]:
    """Who asks under a load; nobody but `edge` where there is none. Raises SpecError."""
    if not scenario.loaded:
        said_of_loads = {
            "edges": scenario.edges is not None,
            "warmup": scenario.warmup > 0,
            "allocate": bool(scenario.allocate),
            "handovers": bool(scenario.handovers),
        }
        for key, said in said_of_loads.items():
            if said:
                raise SpecError(
                    f"{place}: {key}: is of a load, such as load: closed(think=1s), and there is none"
                )
        if scenario.serving != [Fifo()]:
            raise SpecError(
                f"{place}: serving: {scenario.serving[0]}: nobody waits where requests come one after the other; "
                "write a load, such as load: closed(clients=8)"
            )
        return ()
    if isinstance(scenario.edges, int):
        cloud = scenario.cloud
        found = [node.name for node in topology.nodes if topology.interfaces(node.name)[0].end == "a"]
        edges = [name for name in found if len(topology.interfaces(name)) == 1 and name != cloud]
        return matched(dict.fromkeys(edges, _OWN), topology, cloud, place)
    if scenario.edges is None:
        return matched({scenario.edge: _OWN}, topology, scenario.cloud, place)
    return matched(scenario.edges, topology, scenario.cloud, place)


def handovers_of(
    scenario: Scenario, edges: tuple[Edge, ...], topology: Topology, place: str
) -> tuple[Handover, ...]:
    """Which edge goes over where, and when. Raises SpecError."""
    try:
        until_s = scenario.warmup + scenario.duration
        return resolved(scenario.handovers, edges, topology, scenario.cloud, until_s)
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from None


def bound_load(
    scenario: Scenario,
    edges: tuple[Edge, ...],
    devices: Mapping[str, Device],
    topology: Topology,
    place: str,
) -> tuple[Scenario, tuple[Edge, ...]]:
    """The scenario with loads' files where they are, and the edges with what their codecs refer to written out. Raises SpecError
    for what no load is put on with."""
    if not scenario.loaded:
        return scenario, edges
    try:
        loads = [load.bound() for load in scenario.load]
        until_s = scenario.warmup + scenario.duration
        names = [edge.node for edge in edges]
        for load in loads:
            if isinstance(load, Open):
                _some_count(load, load.arrivals(names, until_s, f"{scenario.seed}/0/0"), scenario)
    except SpecError as error:
        raise SpecError(f"{place}: load: {error}") from None
    _check(scenario, devices, place)
    if scenario.allocate:
        try:
            allocation.check(scenario.allocate, edges, topology)
        except SpecError as error:
            raise SpecError(f"{place}: allocate: {error}") from None
    bound = tuple(_bound(edge, scenario, place) for edge in edges)
    return scenario.model_copy(update={"load": loads}), bound


def _some_count(load: Load, arrivals: Sequence[Arrival], scenario: Scenario) -> None:
    """Raises SpecError where no request comes up in the part of a load that counts."""
    if not any(arrival.at >= scenario.warmup for arrival in arrivals):
        until = exact_time(scenario.warmup + scenario.duration)
        raise SpecError(
            f"{load}: nobody asks from {exact_time(scenario.warmup)} to {until}, the part of it that counts; ask more often, or "
            "for longer"
        )


def _check(scenario: Scenario, devices: Mapping[str, Device], place: str) -> None:
    if not all(load.timed for load in scenario.load):
        raise SpecError(f"{place}: load: sequential beside others; make it a scenario of its own")
    for serving in scenario.serving:
        device = devices.get("cloud")
        if serving.most > 1 and device is not None and not device.times.decode:
            raise SpecError(
                f"{place}: serving: {serving}: how long a token of several requests takes follows from a device's times of "
                f"decoding, and device {device.name} has none; take another (`testbed devices` lists them), or fifo, or shortest"
            )
    refused: dict[str, list[Any]] = {
        "placements": [p for p in scenario.placements if p not in _PLACEMENTS],
        "delivery": [str(d) for d in scenario.delivery if not isinstance(d, Whole) and not _by_tokens(d)],
        "at": [scenario.at] if scenario.at == "example" else [],
    }
    can = {
        "placements": ", ".join(_PLACEMENTS),
        "delivery": "whole, stream(by=tokens)",
        "at": "trial, run",
    }
    for key, values in refused.items():
        if values:
            raise SpecError(f"{place}: {key}: {str(values[0])[:60]} under a load; there it takes {can[key]}")


def _by_tokens(delivery: Delivery) -> bool:
    """Whether it streams blocks of tokens: levels chosen on the way, or layers read as they come, are not made beforehand."""
    return isinstance(delivery, Stream) and delivery.by == "tokens"


def _bound(edge: Edge, scenario: Scenario, place: str) -> Edge:
    codec: CodecSpec | None = edge.codec
    if codec is None:
        return edge
    if codec.unfit:
        raise SpecError(f"{place}: edges.{edge.node}.codec: {codec.unfit}")
    if is_shape(scenario.models.edge) and (why := needs_values(codec)):
        raise SpecError(
            f"{place}: edges.{edge.node}.codec: {str(codec)!r}: {why}, and those of model {scenario.models.edge} only stand in"
        )
    if codec.refers:
        codec = codec.bound(find_model(scenario.models.edge).name)
    return Edge(edge.node, edge.link, edge.profile, codec)
