"""By which of a node's links all others reach it."""

from __future__ import annotations

from testbed.errors import UsageError
from testbed.net.topology import routing
from testbed.net.topology.routing import Interface
from testbed.net.topology.topology import Topology


def ways_to(topology: Topology, node: str, link: str) -> dict[str, Interface]:
    """Every other node, and the interface by which it reaches *node* where that is on its *link* alone.

    Raises SpecError for an unknown node or link, UsageError where the link is not the node's, its only one, or does not lead
    everywhere.
    """
    number, own = topology.link_number(link), topology.interfaces(node)
    names = ", ".join(topology.links[end.link].name for end in own)
    if number not in [end.link for end in own]:
        raise UsageError(f"{node} is not on link {link}; it has {names}")
    gone = {end.link for end in own if end.link != number}
    if not gone:
        raise UsageError(f"{node} has no other link than {link} to go over from")
    ends = {name: tuple(end for end in each if end.link not in gone) for name, each in topology.ends.items()}
    found = {}
    for name in ends:
        if name != node:
            hops = routing.first_hops(name, ends)
            if node not in hops:
                raise UsageError(f"by that link alone, {node} does not reach {name}")
            found[name] = hops[node][0]
    return found
