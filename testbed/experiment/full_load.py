"""Whether a machine carries so many edges faithfully: one edge's link is measured while a flow from every other fills theirs; of
a cell whose links contend, what flows from all of its edges come to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from testbed.experiment.scenario import Plan
from testbed.net.calibration.calibrate import Calibration, calibrate
from testbed.net.calibration.load import TCP_SHARE, Ends, flowing
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile
from testbed.net.profile.trace import Way
from testbed.net.sharing.equal import Equal
from testbed.units import format_rate

#: TCP with CUBIC leaves so much of a steady link without loss unused at times; where it is more, it is the machine.
_UNUSED = 0.1
_SETTLE_S, _SECONDS = 0.5, 1.5
_CONTENDING_S = 1.5  # until flows that begin together have found their parts


@dataclass(frozen=True)
class Full:
    """The first edge's link while the others were full: what they came to together, and what fills their links (None: nobody
    can say), bits of payload a second."""

    calibration: Calibration
    carried_bps: float
    asked_bps: float | None

    @property
    def ok(self) -> bool:
        """Whether the link was what it was asked for, and the others carried what they were."""
        return not self.cause

    @property
    def cause(self) -> str:
        """What was out of tolerance; empty: nothing."""
        causes = [self.calibration.cause] if not self.calibration.ok else []
        if self.asked_bps is not None and self.carried_bps < (1 - _UNUSED) * self.asked_bps:
            causes.append(
                f"the others came to {format_rate(self.carried_bps)} of the {format_rate(self.asked_bps)} that fill them"
            )
        return "; ".join(causes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        about = {"others_carried_bps": self.carried_bps, "others_asked_bps": self.asked_bps}
        return {**self.calibration.to_dict(), **about, "ok": self.ok, "cause": self.cause}


@dataclass(frozen=True)
class Contended:
    """A cell whose edges all sent at once: what each came to, and what its part of the cell is (None: nobody can say), bits of
    payload a second, by link; `alike`: each is to have its part, else all of them together.
    """

    cell: str
    carried_bps: dict[str, float]
    asked_bps: dict[str, float] | None
    alike: bool

    @property
    def ok(self) -> bool:
        """Whether they came to what the cell carries, each of them where it has a part."""
        return not self.cause

    @property
    def cause(self) -> str:
        """What fell short; empty: nothing."""
        if self.asked_bps is None:
            return ""
        carried, asked = sum(self.carried_bps.values()), sum(self.asked_bps.values())
        if carried < (1 - _UNUSED) * asked:
            return f"they came to {format_rate(carried)} of the {format_rate(asked)} that the cell carries"
        link = min(self.asked_bps, key=lambda link: self.carried_bps[link] / self.asked_bps[link])  # type: ignore[index]
        own, part = self.carried_bps[link], self.asked_bps[link]
        if self.alike and own < (1 - _UNUSED) * part:
            return f"{link} came to {format_rate(own)} of its part, {format_rate(part)}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok, "cause": self.cause}


def contended(fabric: Fabric, plan: Plan) -> Contended | None:
    """The first edge's cell, as it is shared out now, while every edge in it sends; None where it is in none, its part is fixed,
    or nobody else is there. What it is held against needs steady rates without loss up to the cloud itself, and, where one queue
    is all there is, rates that are alike.
    """
    topology = fabric.topology
    cell = topology.cell(topology.link(plan.edges[0].link))
    if cell is None or cell.sharing.fixed:
        return None
    edges = [edge for edge in plan.edges if topology.link(edge.link).cell == cell.name]
    if len(edges) < 2:
        return None
    cloud = plan.scenario.cloud
    rates: dict[str, float | None] = {}
    for edge in edges:
        link = topology.link(edge.link)
        way: Way = "up" if link.a == edge.node else "down"
        direct = cloud in (link.a, link.b) and _steady(link.profile)
        rates[edge.link] = link.profile.ways[way].mean_rate_bps(way) if direct else None
    known = {link: rate * TCP_SHARE / len(edges) for link, rate in rates.items() if rate is not None}
    told = len(known) == len(edges) and not (cell.sharing.pooled and len(set(known.values())) > 1)
    flows = [Ends(e.link, e.node, cloud, cloud_address(plan, fabric, e.link)) for e in edges]
    with flowing(fabric, flows) as load:
        carried = load.rates_bps(_CONTENDING_S, _SECONDS)
    return Contended(cell.name, carried, known if told else None, isinstance(cell.sharing, Equal))


def measured(fabric: Fabric, plan: Plan) -> Full | None:
    """With all links as they are now; None where there is nobody else, or nothing that could be full.

    Links that share a cell with the first edge's stay empty where its part of the cell would depend on them.
    """
    topology = fabric.topology
    first, *others = plan.edges
    full = {edge.link: edge for edge in others if edge.link != first.link}
    own, links = topology.link(first.link), {link: topology.link(link) for link in full}
    profiles = {name: link.profile.scaled(topology.alone(link)) for name, link in links.items()}
    full = {
        name: edge
        for name, edge in full.items()
        if _rate_bps(profiles[name]) is not None and not topology.contend(own, links[name])
    }
    if not full:
        return None
    cloud = plan.scenario.cloud
    flows = [
        Ends(edge.node, edge.node, cloud, cloud_address(plan, fabric, link)) for link, edge in full.items()
    ]
    apart = plan.own_links and not any(topology.contend(links[name], links[name]) for name in full)
    asked = [_filled_bps(profiles[name]) for name in full] if apart else [None]
    with flowing(fabric, flows) as load:
        found = calibrate(fabric, first.link, own.profile, quick=True, share=topology.alone(own))
        carried = sum(load.rates_bps(_SETTLE_S, _SECONDS).values())
    known = [rate for rate in asked if rate is not None]
    return Full(found, carried, sum(known) if len(known) == len(asked) else None)


def cloud_address(plan: Plan, fabric: Fabric, link: str) -> str:
    """The cloud's, as an edge behind that link asks it."""
    cloud, leaving = plan.scenario.cloud, fabric.topology.link(link)
    return fabric.topology.address(cloud, link if cloud in (leaving.a, leaving.b) else None)


def _rate_bps(profile: Profile) -> float | None:
    """Of the slower way; None where one has no limit."""
    rates = [direction.mean_rate_bps(way) for way, direction in profile.ways.items()]
    known = [rate for rate in rates if rate is not None]
    return min(known) if len(known) == len(rates) else None


def _filled_bps(profile: Profile) -> float | None:
    """Payload that a TCP flow brings over such a link; None where loss or a trace decide that."""
    rate = _rate_bps(profile)
    return rate * TCP_SHARE if _steady(profile) and rate is not None else None


def _steady(profile: Profile) -> bool:
    """Whether its rates are the same all the time, and nothing is lost but what its queue has no room for."""
    return not profile.changes and not any(d.loss or d.loss_model for d in profile.ways.values())
