"""Whether a machine carries so many edges faithfully: one edge's link is measured while a flow from every other fills theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from testbed.experiment.scenario import Plan
from testbed.net.calibration.calibrate import Calibration, calibrate
from testbed.net.calibration.load import TCP_SHARE, Ends, flowing
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile
from testbed.units import format_rate

#: TCP with CUBIC leaves so much of a steady link without loss unused at times; where it is more, it is the machine.
_UNUSED = 0.1
_SETTLE_S, _SECONDS = 0.5, 1.5


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
    steady = not profile.changes and not any(d.loss or d.loss_model for d in profile.ways.values())
    return rate * TCP_SHARE if steady and rate is not None else None
