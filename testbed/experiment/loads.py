"""What a scenario says of loads, looked up and held against what can be put on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import SKIP, TEXT, Delivery, Pipelined
from testbed.delivery.stream import Stream
from testbed.delivery.whole import Whole
from testbed.errors import SpecError, UsageError
from testbed.experiment import allocation
from testbed.experiment.devices import look_up, needs_values
from testbed.experiment.edges import Edge, Edges, Own, matched
from testbed.experiment.handovers import Handover, resolved
from testbed.experiment.scenario import Scenario
from testbed.load.load import Arrival, Load, Open
from testbed.models.shapes import find_shape, is_shape
from testbed.models.sources import find as find_model
from testbed.net.topology.topology import Topology
from testbed.serving.fifo import Fifo
from testbed.speed.files import Device
from testbed.transport.wire import MAX_PARTS
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
    asked: Mapping[str, str],
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
    bound = tuple(_bound(edge, scenario, asked, place) for edge in edges)
    return scenario.model_copy(update={"load": loads, "edges": _found(scenario)}), bound


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
    _check_batches(scenario, devices, f"{place}: serving")
    refused: dict[str, list[str]] = {
        "placements": [p for p in scenario.placements if p not in _PLACEMENTS],
        "at": [scenario.at] if scenario.at == "example" else [],
    }
    can = {"placements": ", ".join(_PLACEMENTS), "at": "trial, run"}
    for key, values in refused.items():
        if values:
            raise SpecError(f"{place}: {key}: {str(values[0])[:60]} under a load; there it takes {can[key]}")
    for delivery in scenario.delivery:
        _check_delivery(delivery, scenario, is_shape(scenario.models.edge), f"{place}: delivery")


def _check_batches(scenario: Scenario, devices: Mapping[str, Device], here: str) -> None:
    device = devices.get("cloud")
    for serving in scenario.serving:
        if serving.most > 1 and device is not None and not device.times.decode:
            raise SpecError(
                f"{here}: {serving}: how long a token of several requests takes follows from a device's times of "
                f"decoding, and device {device.name} has none; take another (`testbed devices` lists them), or fifo, or shortest"
            )


def _check_delivery(delivery: Delivery, scenario: Scenario, shape: bool, here: str) -> None:
    """What is decided on the way is not made beforehand, but for levels of what is stored, of which nobody knows the answers."""
    if isinstance(delivery, Adaptive):
        if why := _not_stored(delivery, scenario, shape):
            raise SpecError(f"{here}: adaptive under a load: {why}")
    elif not isinstance(delivery, Whole | Stream):
        raise SpecError(f"{here}: {str(delivery)[:60]} under a load; there it takes whole, stream, adaptive")


def _not_stored(delivery: Adaptive, scenario: Scenario, shape: bool) -> str:
    """Why no such request can be made beforehand; empty where one can."""
    if any(placement != "store" for placement in scenario.placements):
        return "each level has to lie at the edge before; write placements: store"
    if not shape:
        return "nobody knows beforehand what parts of several levels answer; take a shape, as model: shape:llama-3.1-8b"
    if delivery.policy.foresees:
        return f"policy {delivery.policy} is told a rate, which others share; take mpc, ewma, throughput or fixed"
    if TEXT in delivery.levels:
        return f"level {TEXT} would be computed in the cloud behind others' requests; take codecs, and {SKIP}"
    if chosen := next((codec for codec in delivery.codecs if codec.selector is not None), None):
        return f"level {chosen} chooses tokens; take those that send all"
    return ""


def _found(scenario: Scenario) -> Edges | None:
    """What is each edge's own, with device profiles where they are."""
    if not isinstance(scenario.edges, dict):
        return scenario.edges
    found = {}
    for name, own in scenario.edges.items():
        if own.compute is not None:
            compute = look_up(_as_own(scenario, own), name)[0].compute
            own = own.model_copy(update={"compute": compute})
        found[name] = own
    return found


def _as_own(scenario: Scenario, own: Own | Edge) -> Scenario:
    """The scenario as such an edge's requests have it."""
    said: dict[str, Any] = {"model": own.model, "compute": own.compute}
    said |= {"codecs": own.codec and [own.codec], "delivery": own.delivery and [own.delivery]}
    return scenario.model_copy(update={key: value for key, value in said.items() if value is not None})


def _bound(edge: Edge, scenario: Scenario, asked: Mapping[str, str], place: str) -> Edge:
    """The edge with what its codec and delivery refer to written out, and the devices whose times are waited for."""
    here = f"{place}: edges.{edge.node}"
    try:
        if edge.model in (scenario.models.edge, None) and edge.compute is None:
            edge = replace(edge, model=None)
        else:
            edge = _computing(edge, scenario, asked, here)
        model = _as_own(scenario, edge).models.edge
        return _coded(edge, scenario, find_model(model).name, is_shape(model), here)
    except UsageError as error:
        text = str(error)
        raise SpecError(text if text.startswith(place) else f"{here}: {text}") from None


def _coded(edge: Edge, scenario: Scenario, model: str, shape: bool, here: str) -> Edge:
    codec, delivery = edge.codec, edge.delivery
    if codec is not None:
        if codec.unfit:
            raise SpecError(f"{here}.codec: {codec.unfit}")
        if shape and (why := needs_values(codec)):
            raise SpecError(f"{here}.codec: {str(codec)!r}: {why}, and those of model {model} only stand in")
        codec = codec.bound(model) if codec.refers else codec
    if delivery is not None:
        _check_delivery(delivery, scenario, shape, f"{here}.delivery")
        delivery = delivery.bound(model)
        for tokens in filter(None, scenario.context_tokens):
            if isinstance(delivery, Pipelined) and (why := delivery.too_many(tokens, 1, MAX_PARTS)):
                raise SpecError(f"{here}.delivery: {why}")
    both = itertools.product(
        [codec] if codec else scenario.codecs, [delivery] if delivery else scenario.delivery
    )
    if why := next(filter(None, (each.unfit(str(spec)) for spec, each in both)), ""):
        raise SpecError(f"{here}: {why}")
    return replace(edge, codec=codec, delivery=delivery)


def _computing(edge: Edge, scenario: Scenario, asked: Mapping[str, str], here: str) -> Edge:
    """An edge whose requests are computed by another model, or as on other devices."""
    model = edge.model or scenario.models.edge
    if is_shape(model):
        find_shape(model)  # what it does not know is told before anything of it is looked up
    bound = [text for codec in scenario.codecs if (text := str(codec)) in asked]
    if edge.model and edge.codec is None and bound:
        raise SpecError(
            f"{here}.model: codec {asked[bound[0]]!r} is what was found of model {scenario.models.edge}; give this edge a codec "
            "of its own"
        )
    own, devices = look_up(_as_own(scenario, edge), here)
    _check_batches(scenario, devices, f"{here}: serving")
    return replace(edge, compute=own.compute, devices=devices)
