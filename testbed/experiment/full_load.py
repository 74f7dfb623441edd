"""Whether a machine carries so many edges faithfully: one edge's link is measured while a flow from every other fills theirs."""

from __future__ import annotations

from testbed.experiment.scenario import Plan
from testbed.net.calibration.calibrate import Calibration, calibrate
from testbed.net.calibration.load import Ends, flowing
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import Profile


def measured(fabric: Fabric, plan: Plan) -> Calibration | None:
    """The first edge's link as it is now, under what it is; None where there is nobody else, or nothing that could be full."""
    topology = fabric.topology
    first, *others = plan.edges
    flows = [
        Ends(edge.node, edge.node, plan.scenario.cloud, cloud_address(plan, fabric, edge.link))
        for edge in others
        if edge.link != first.link and _limited(topology.link(edge.link).profile)
    ]
    if not flows:
        return None
    with flowing(fabric, flows):
        return calibrate(fabric, first.link, topology.link(first.link).profile, quick=True)


def cloud_address(plan: Plan, fabric: Fabric, link: str) -> str:
    """The cloud's, as an edge behind that link asks it."""
    cloud, leaving = plan.scenario.cloud, fabric.topology.link(link)
    return fabric.topology.address(cloud, link if cloud in (leaving.a, leaving.b) else None)


def _limited(profile: Profile) -> bool:
    return all(direction.mean_rate_bps(way) is not None for way, direction in profile.ways.items())
