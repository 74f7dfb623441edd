"""What a scenario says of many edges: which nodes they are, what is each one's own, and by which links they leave them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer

from testbed import strict_yaml
from testbed.codecs.spec import CodecSpec
from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import Delivery
from testbed.errors import SpecError
from testbed.experiment import readers
from testbed.experiment.sides import Compute
from testbed.net.profile.profile import Profile, profile_from
from testbed.net.topology.topology import Topology
from testbed.speed.files import Device

#: What one machine runs: a process an edge.
MOST = 64


def _codec(value: Any) -> CodecSpec | None:
    return parse_codec(str(value)) if value is not None else None


def _delivery(value: Any) -> Delivery | None:
    return readers.delivery(value) if value is not None else None


class Own(BaseModel):
    """What is one edge's own, or that of all whose names match; else it has the cell's."""

    model_config = ConfigDict(extra="forbid")

    profile: Any = None  #: of its link
    codec: Annotated[
        InstanceOf[CodecSpec] | None,
        BeforeValidator(_codec),
        PlainSerializer(str, when_used="json-unless-none"),
    ] = None
    delivery: Annotated[
        InstanceOf[Delivery] | None,
        BeforeValidator(_delivery),
        PlainSerializer(str, when_used="json-unless-none"),
    ] = None
    model: Annotated[str, Field(min_length=1)] | None = (
        None  #: of its requests, which the cloud then has, too
    )
    compute: Compute | None = None  #: of its requests, on both sides


#: Names or patterns of nodes, with what is each one's own; a number: so many, which a generated topology then has.
Edges = int | dict[str, Own]


def edges_from(value: Any) -> Edges | None:
    """What a scenario says of its edges. Raises SpecError."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST:
            raise SpecError(f"{value} edges; this machine runs 1 to {MOST}")
        return value
    if isinstance(value, str):
        return {value: Own()}
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise SpecError(f"{next(name for name in value if value.count(name) > 1)!r} is listed twice")
        return dict.fromkeys(value, Own())
    if isinstance(value, Mapping) and value:
        found = {}
        for name, own in value.items():
            settings = own.model_dump() if isinstance(own, Own) else own
            found[str(name)] = strict_yaml.checked(Own, settings if settings is not None else {}, str(name))
        return found
    raise SpecError(
        f"{str(value)[:40]!r}: write a number, a name or a pattern such as n*, a list of them, or a mapping with what is each "
        "one's own, such as {n1: {profile: lte, codec: int8}}"
    )


@dataclass(frozen=True)
class Edge:
    """An edge of a plan: its node, the link by which it leaves that, and what is its own (None: the cell's). devices: whose
    times are waited for, by side, where it has a model or `compute` of its own.
    """

    node: str
    link: str
    profile: Profile | None = None
    codec: CodecSpec | None = None
    delivery: Delivery | None = None
    model: str | None = None
    compute: Compute | None = None
    devices: dict[str, Device] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: its node, and what is its own."""
        own: dict[str, Any] = {
            "profile": self.profile and self.profile.name,
            "codec": self.codec,
            "delivery": self.delivery,
        }
        own |= {"model": self.model}
        if self.compute is not None and self.compute != Compute():
            sides = {"edge": self.compute.edge, "cloud": self.compute.cloud}
            names = {side: device.name for side, device in self.devices.items()}
            own["compute"] = " / ".join(names.get(side) or str(at.written()) for side, at in sides.items())
        said = ", ".join(f"{key} {value}" for key, value in own.items() if value)
        return f"{self.node} ({said})" if said else self.node

    @property
    def computed(self) -> str:
        """What tells apart whose requests are computed by another model, or as elsewhere; empty: as the scenario has it."""
        return f"{self.model or ''} {self._speeds}".strip()

    @property
    def said(self) -> list[str]:
        """All of that as text, for a cell's identity."""
        own = [self.node, self.link, self.profile.text() if self.profile else "", str(self.codec or "")]
        more = [str(self.delivery or ""), self.model or "", self._speeds]
        return own + (more if any(more) else [])

    @property
    def _speeds(self) -> str:
        """How both sides compute, a device by its times, wherever its file lies."""
        if self.compute is None:
            return ""
        found = []
        for side in ("edge", "cloud"):
            speed, device = getattr(self.compute, side), self.devices.get(side)
            named = replace(speed, device=f"{device.name}/{device.digest}") if device else speed
            found.append(f"{side}: {named.written()}")
        return ", ".join(found)


def matched(edges: dict[str, Own], topology: Topology, cloud: str, place: str) -> tuple[Edge, ...]:
    """The nodes that these names and patterns mean, in the topology's order; a name's own goes before a pattern's.

    Raises SpecError: a name or a pattern of no node, the cloud, or too many.
    """
    names = [node.name for node in topology.nodes]
    found: dict[str, Own] = {}
    for pattern, own in edges.items():
        meant = [name for name in fnmatch.filter(names, pattern) if name != cloud or pattern == name]
        if not meant:
            raise SpecError(f"{place}: edges: topology {topology.name} has no node {pattern[:40]!r}; it has "
                            f"{', '.join(names[:12])}{' …' if len(names) > 12 else ''}")  # fmt: skip
        if cloud in meant:
            raise SpecError(f"{place}: edges: {cloud!r} is the cloud")
        for name in meant:
            exact = pattern == name
            if name not in found or exact:
                found[name] = own
    if len(found) > MOST:
        raise SpecError(f"{place}: edges: {len(found)} of them; this machine runs at most {MOST}")
    return tuple(_edge(name, found[name], topology, place) for name in names if name in found)


def _edge(name: str, own: Own, topology: Topology, place: str) -> Edge:
    link = topology.links[topology.interfaces(name)[0].link].name
    more = (own.codec, own.delivery, own.model, own.compute)
    if own.profile is None:
        return Edge(name, link, None, *more)
    here = f"{place}: edges.{name}.profile"
    profile = profile_from(own.profile, here)
    for way, direction in profile.ways.items():
        direction.schedule(
            way, 0.0
        )  # its trace's file is read, and what is wrong with it known before anything is built
    return Edge(name, link, profile, *more)
