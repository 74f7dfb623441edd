"""The processes of a load: a cloud, and an edge on each node that asks; none of them has a model.

An edge that ends takes with it what it had not told yet; everybody else goes on, and it is started again for the next load.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from testbed.endpoints import protocol
from testbed.endpoints.endpoint import Endpoint, Gone
from testbed.endpoints.load_messages import Answers, Collect, Happened, Looping, Offer, Planned, Stage
from testbed.endpoints.protocol import Link
from testbed.errors import EndpointError
from testbed.experiment.full_load import cloud_address
from testbed.experiment.handovers import Handing, Met
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Cell, Plan
from testbed.experiment.session import endpoint
from testbed.experiment.wares import Wares
from testbed.load.load import Arrival, Client
from testbed.net.fabric.fabric import Fabric

#: Until which everybody has been told what to ask, and each one more.
_SETTING_OUT_S, _EACH_S = 0.3, 0.01
#: Between two looks at what became of requests.
_LOOK_S = 0.5
_CALL_S = 60.0
#: Behind the last moment at which a request may end by itself.
_GRACE_S = 30.0


@dataclass
class Put:
    """A load for some edges: wares by edge and example, and who asks: requests that are planned, or clients that ask again."""

    cell: Cell
    until_s: float
    wares: list[list[int]]
    arrivals: list[Arrival] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    think_s: float = 0.0

    def offers(self, names: list[str], origin: float) -> list[Offer]:
        """What each edge is told."""
        planned: list[list[Planned]] = [[] for _ in names]
        for number, (at, edge) in enumerate(self.arrivals):
            wares = self.wares[edge]
            planned[edge].append(Planned(number, at, names[edge], wares[number % len(wares)]))
        looping: list[list[Looping]] = [[] for _ in names]
        several = len(self.clients) > len(names)
        for number, (edge, at) in enumerate(self.clients):
            wares = self.wares[edge]
            turn = number % len(wares)
            name = f"{names[edge]}.{len(looping[edge]) + 1}" if several else names[edge]
            looping[edge].append(
                Looping(name, at, number, len(self.clients), tuple(wares[turn:] + wares[:turn]))
            )
        return [
            Offer(origin, tuple(p), tuple(each), self.think_s, self.until_s)
            for p, each in zip(planned, looping, strict=True)
        ]


class Crowd:
    """A context manager: the processes are there within its block. Its methods raise EndpointError where the cloud fails, and
    NetworkError where a process that a link needs has ended.
    """

    def __init__(self, plan: Plan, fabric: Fabric, directory: RunDirectory, wares: Wares) -> None:
        self._plan, self._fabric, self._directory, self._wares = plan, fabric, directory, wares
        self._stack = contextlib.ExitStack()
        self._ports: dict[str, int] = {}  #: by transport
        self._edges: list[Endpoint | None] = [None] * len(plan.edges)

    def __enter__(self) -> Crowd:
        plan = self._plan
        try:
            self._cloud = self._started("cloud", plan.scenario.cloud)
            for transport in plan.scenario.transport:
                message = protocol.Serve(
                    self._wares.bound,
                    plan.swept.congestion,
                    plan.scenario.timeout,
                    transport=str(transport),
                )
                self._ports[str(transport)] = self._cloud.call(message, _CALL_S)
            self._start_edges()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _started(self, role: str, node: str) -> Endpoint:
        host = self._fabric.host(node)
        return self._stack.enter_context(
            endpoint(f"replayed_{role}", host, self._directory, f"{role}-{node}")
        )

    def _start_edges(self) -> None:
        """Those that are not there: all at once, since each takes a while to be."""
        for number, edge in enumerate(self._plan.edges):
            if self._edges[number] is None:
                self._edges[number] = self._started("edge", edge.node)

    def ask(self, cell: Cell, put: Put) -> tuple[list[tuple[int, Happened]], list[Met]]:
        """Put a load on; what became of each request, with its edge's number, and of its handovers."""
        self._start_edges()
        names = [edge.node for edge in self._plan.edges]
        self._stage(cell, put)
        origin = time.monotonic() + _SETTING_OUT_S + _EACH_S * len(names)
        offers = put.offers(names, origin)
        lost: dict[int, str] = {}
        with Handing(self._fabric, self._plan.handovers, origin) as handing:
            for number, offer in enumerate(offers):
                self._call(number, offer, lost)
            happened = self._collected(set(range(len(names))), origin + put.until_s, lost)
        for number, why in lost.items():
            told = [each for edge, each in happened if edge == number]
            happened += [(number, each) for each in _missing(offers[number], told, why)]
            self._edges[number] = None
        return happened, handing.met

    def _stage(self, cell: Cell, put: Put) -> None:
        plan = self._plan
        devices = {edge.computed: plan.of_edge(edge).devices.get("cloud") for edge in plan.edges}
        times = {who: device.times for who, device in devices.items() if device is not None}
        used = {number for own in put.wares for number in own}
        answers = {number: self._wares.numbered(number).answer for number in used}
        self._cloud.call(Answers(str(cell.serving), answers, times), _CALL_S)
        for number, own in enumerate(put.wares):
            wares = {ware: self._wares.numbered(ware).ware for ware in own}
            edge = self._edges[number]
            assert edge is not None
            edge.call(Stage(wares, self._link(number, cell)), _CALL_S)

    def _link(self, number: int, cell: Cell) -> Link:
        edge, scenario = self._plan.edges[number], self._plan.scenario
        topology = self._fabric.topology
        link = topology.link(edge.link)
        address = cloud_address(self._plan, self._fabric, edge.link)
        transport = str(cell.transport)
        return Link(
            address,
            self._ports[transport],
            edge.link,
            transport,
            link.congestion,
            timeout=scenario.timeout,
        )

    def _call(
        self, number: int, message: protocol.Message[protocol.T], lost: dict[int, str]
    ) -> protocol.T | None:
        """What an edge answers; where it has ended, that is noted, and why."""
        edge = self._edges[number]
        assert edge is not None
        try:
            return edge.call(message, _CALL_S)
        except Gone as error:
            lost[number] = str(error)
            return None

    def _collected(self, waited: set[int], ends: float, lost: dict[int, str]) -> list[tuple[int, Happened]]:
        """What became of all requests, once nobody has any left."""
        happened: list[tuple[int, Happened]] = []
        timeout = self._plan.scenario.timeout
        given_up = ends + 2 * timeout + _GRACE_S
        waited = waited - set(lost)
        while waited:
            time.sleep(_LOOK_S)
            self._fabric.check()
            self._cloud.check()
            for number in sorted(waited):
                collected = self._call(number, Collect(), lost)
                if collected is None:
                    waited.discard(number)
                    continue
                happened += [(number, each) for each in collected.happened]
                if not collected.open:
                    waited.discard(number)
            if waited and time.monotonic() > given_up:
                edge = self._plan.edges[min(waited)].node
                raise EndpointError(
                    f"edge {edge} still has requests {2 * timeout:.0f} s behind the load's end"
                )
        return happened


def _missing(offer: Offer, told: Iterable[Happened], why: str) -> list[Happened]:
    """The requests that an edge took with it: all that were planned, and one of each client that asks again."""
    known = {each.number for each in told}
    gone = [
        Happened(p.number, p.client, p.at, p.ware, error=why) for p in offer.planned if p.number not in known
    ]
    for client in offer.looping:
        number, turn = client.number, 0
        while number in known:
            number, turn = number + client.stride, turn + 1
        before = [each.at for each in told if each.client == client.client]
        ware = client.wares[turn % len(client.wares)]
        gone.append(Happened(number, client.client, max(before, default=client.at), ware, error=why))
    return gone
