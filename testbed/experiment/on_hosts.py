"""A scenario whose nodes are machines of their own: what it leaves to its topology, and what it cannot ask for."""

from __future__ import annotations

from typing import Any

from testbed.errors import SpecError
from testbed.experiment.scenario import Scenario
from testbed.net.topology.topology import Topology


def on_hosts(scenario: Scenario, topology: Topology, link: str, place: str) -> Scenario:
    """The scenario with the profile of its link, and the devices of its nodes, where it names none. Raises SpecError."""
    swept = topology.link(link)
    between = f"{place}: topology {topology.name} is of hosts"
    if {swept.a, swept.b} != {scenario.edge, scenario.cloud}:
        raise SpecError(
            f"{between}, which forward nothing: link {link} joins {swept.a} and {swept.b}, not {scenario.edge} and "
            f"{scenario.cloud}"
        )
    if scenario.traffic:
        raise SpecError(
            f"{between}: traffic is for namespaces; start what loads the link on the hosts themselves"
        )
    if scenario.emulator != "auto":
        raise SpecError(
            f"{between}: emulator is for namespaces; a link is put under a profile by its `shape:`"
        )
    if others := [name for name in scenario.links if name != link]:
        raise SpecError(f"{between}: links.{others[0]}: its trials cross {link} alone")
    sides = {
        side: topology.node(getattr(scenario, side)).device or "auto"
        for side in ("edge", "cloud")
        if getattr(scenario.device, side) == "auto"
    }
    changes: dict[str, Any] = {"device": scenario.device.model_copy(update=sides)}
    if not scenario.profiles:
        changes["profiles"] = [str(swept.profile)]
    return scenario.model_copy(update=changes)
