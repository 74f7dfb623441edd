"""A node goes over from one of its links to another while its connections go on, or break.

    edge ═ radio-a ═ tower-a ═╗   by radio-a; then, while the outage lasts, by neither; then by radio-b
         ═ radio-b ═ tower-b ═╩═ cloud

What is under way on the link that is left is lost, as where a cell does not pass on what it holds. Until the outage is over the
node sends into the void, and learns of nothing.
"""

from __future__ import annotations

import socket
import time

from testbed.net.fabric import wiring
from testbed.net.fabric.state import State
from testbed.net.topology import routing
from testbed.net.topology.reaching import ways_to
from testbed.net.topology.routing import Interface

LONGEST_S = 600.0
"""Of an outage."""


def hand_over(state: State, node: str, link: str, outage_s: float, *, keep_address: bool = True) -> float:
    """Has *node* be reached, and reach all others, by its *link* alone. Returns how long it was by none, in seconds.

    *keep_address*: the node is still reached by the addresses it had, as behind a mobile core; else they are taken from it, and
    whoever wants to reach it needs the new one. Raises SpecError for an unknown node or link, UsageError where the link is not
    the node's or does not lead everywhere, NetworkError.
    """
    topology, number = state.topology, state.topology.link_number(link)
    ways = ways_to(topology, node, link)
    own = topology.interfaces(node)
    fresh, left = (next(e for e in own if e.link == number), [e for e in own if e.link != number])
    begun = time.monotonic()
    for end in left:  # the far end alone: the node's own stays up, as a radio does that hears nothing
        with wiring.changing(state, state.namespace(end.peer_node)) as network:
            network.link("set", index=socket.if_nametoindex(_far(state, end).name), state="down")
    time.sleep(max(0.0, begun + outage_s - time.monotonic()))
    wiring.set_link(state, number, True)
    addresses = [each for end in own for each in (end.address, end.address6) if each]
    for name, first in ways.items():
        others = [each for end in topology.interfaces(name) for each in (end.address, end.address6) if each]
        _route(state, node, others, fresh)
        _route(state, name, addresses, first)
    if not keep_address:
        with wiring.changing(state, state.namespace(node)) as network:
            for end in left:
                for address in filter(None, (end.address, end.address6)):
                    bits = routing.PREFIX_BITS[6 if ":" in address else 4]
                    network.addr(
                        "del", index=socket.if_nametoindex(end.name), address=address, prefixlen=bits
                    )
    return time.monotonic() - begun


def _far(state: State, end: Interface) -> Interface:
    return next(each for each in state.topology.interfaces(end.peer_node) if each.link == end.link)


def _route(state: State, node: str, addresses: list[str], by: Interface) -> None:
    """Has a node send what is for these by one of its interfaces."""
    with wiring.changing(state, state.namespace(node)) as network:
        index = socket.if_nametoindex(by.name)
        for address in addresses:
            gateway, bits = (by.peer6, 128) if ":" in address else (by.peer, 32)
            on_link = {} if address == gateway else {"gateway": gateway}
            network.route("replace", oif=index, dst=f"{address}/{bits}", **on_link)
