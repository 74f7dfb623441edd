"""What a scenario says of handovers: which edge of a load goes over from which of its links to which, and when; and doing it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from testbed import strict_yaml
from testbed.errors import SpecError, TestbedError, UsageError
from testbed.experiment.edges import Edge
from testbed.net.topology.reaching import ways_to
from testbed.net.topology.topology import Topology
from testbed.units import exact_time, parse_time

if TYPE_CHECKING:
    from testbed.net.fabric.fabric import Fabric

_Time = Annotated[
    float, BeforeValidator(parse_time), PlainSerializer(exact_time, when_used="json"), Field(ge=0, le=86400)
]


class Written(BaseModel):
    """One of a scenario's."""

    model_config = ConfigDict(extra="forbid")

    edge: str
    at: _Time  #: behind the load's start, its warm-up included
    to: str  #: link
    #: the link that it is on until then
    left: Annotated[str | None, Field(alias="from")] = None
    outage: Annotated[_Time, Field(le=600)] = 0.0  #: for which it is on none
    #: `kept`: the edge is still reached by what it had, as behind a mobile core; `new`: that is taken from it
    address: Literal["kept", "new"] = "kept"


@dataclass(frozen=True)
class Handover:
    """See `Written`; `at_s`, `outage_s`: seconds."""

    edge: str
    at_s: float
    left: str
    to: str
    outage_s: float
    keep_address: bool


@dataclass(frozen=True)
class Met:
    """A handover that was: its edge, from which link to which, and from when to when it was on none, seconds behind the start."""

    edge: str
    links: str
    begun_s: float
    ended_s: float

    def by(self, edge: str, came_s: float, done_s: float) -> bool:
        """Whether a request of that edge that came up and was done then met it."""
        return edge == self.edge and came_s < self.ended_s and self.begun_s < done_s


def checked(value: Any) -> dict[str, Any]:
    """One of a scenario's, kept as it was written, for the manifest. Raises SpecError."""
    strict_yaml.checked(Written, value)
    return dict(value)


#: As a scenario has it.
Entry = Annotated[dict[str, Any], BeforeValidator(checked)]


def resolved(
    written: Sequence[Mapping[str, Any]],
    edges: Sequence[Edge],
    topology: Topology,
    cloud: str,
    until_s: float,
) -> tuple[Handover, ...]:
    """In the order in which they come. Raises SpecError for what cannot be done."""
    on = {edge.node: edge.link for edge in edges}
    free = dict.fromkeys(on, 0.0)
    found = []
    for number, each in enumerate(map(Written.model_validate, written)):
        here = f"handovers[{number}]"
        if each.edge not in on:
            raise SpecError(f"{here}.edge: {each.edge[:40]!r} is none of {', '.join(on)[:200]}")
        left = on[each.edge]
        if each.left not in (None, left):
            raise SpecError(f"{here}.from: {each.edge} is on {left} then, and not on {str(each.left)[:40]!r}")
        if each.to == left:
            raise SpecError(f"{here}.to: {each.edge} is on {left} already")
        if each.at < free[each.edge]:
            raise SpecError(
                f"{here}.at: {exact_time(each.at)} is before {each.edge}'s handover before it is over; times ascend"
            )
        if each.at + each.outage >= until_s:
            raise SpecError(
                f"{here}.at: it is not over by the load's end, {exact_time(until_s)} behind its start"
            )
        for link in (left, each.to):
            try:
                ways_to(topology, each.edge, link)
            except UsageError as error:
                raise SpecError(f"{here}: {error}") from None
            ends = topology.link(link)
            if cloud in (ends.a, ends.b):
                raise SpecError(
                    f"{here}: link {link} ends at {cloud} itself, which it would be cut off from; put a node between, such as a "
                    "base station"
                )
        on[each.edge], free[each.edge] = each.to, each.at + each.outage
        found.append(Handover(each.edge, each.at, left, each.to, each.outage, each.address == "kept"))
    return tuple(found)


class Handing:
    """A context manager: while a load is on, its handovers are done, each edge's in a thread of its own. `origin`: when the load
    began (CLOCK_MONOTONIC). Leaving it early leaves out what has not begun; it raises what went wrong with one.
    """

    def __init__(self, fabric: Fabric, handovers: Sequence[Handover], origin: float) -> None:
        self._fabric, self._origin = fabric, origin
        self.met: list[Met] = []
        self._failed: list[TestbedError] = []
        self._stop = threading.Event()
        own: dict[str, list[Handover]] = {}
        for each in handovers:
            own.setdefault(each.edge, []).append(each)
        self._threads = [threading.Thread(target=self._do, args=(each,)) for each in own.values()]

    def __enter__(self) -> Handing:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if kind is None and self._failed:
            raise self._failed[0]

    def _do(self, handovers: Sequence[Handover]) -> None:
        from testbed.net.fabric.handover import hand_over

        for each in handovers:
            if self._stop.wait(max(0.0, self._origin + each.at_s - time.monotonic())):
                return
            begun = time.monotonic() - self._origin
            try:
                lasted = hand_over(
                    self._fabric.state, each.edge, each.to, each.outage_s, keep_address=each.keep_address
                )
            except TestbedError as error:
                self._failed.append(error)
                return
            self.met.append(Met(each.edge, f"{each.left} > {each.to}", begun, begun + lasted))


def begin_again(fabric: Fabric, handovers: Sequence[Handover]) -> None:
    """Have every edge that goes over be where it is before the first time. Raises NetworkError."""
    from testbed.net.fabric.handover import hand_over

    for edge in dict.fromkeys(each.edge for each in handovers):
        first = next(each for each in handovers if each.edge == edge)
        hand_over(fabric.state, edge, first.left, 0.0)
