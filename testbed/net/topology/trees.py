"""Routes of a network without circles, for all nodes at once.

Seen from any node, every link lies behind exactly one of its own. So one walk from the first node down tells, for each node,
which links lie below it; all others lie above. Links below are kept as spans of numbers, one for each node of a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from testbed.net.topology import prefixes

if TYPE_CHECKING:
    from testbed.net.topology.routing import Interface

Spans = list[tuple[int, int]]


class Tree:
    """A network that has one link fewer than nodes, all of which hang together."""

    def __init__(self, ends: Mapping[str, tuple[Interface, ...]]) -> None:
        self._ends = ends
        self._links = len(ends) - 1
        self._above: dict[str, str] = {}  # node -> the one nearer to the first
        self._below: dict[str, Spans] = {}  # node -> the numbers of the links that lie below it
        first = next(iter(ends))
        order = [first]
        for node in order:  # grows as it goes
            for interface in ends[node]:
                if interface.peer_node != self._above.get(node):
                    self._above[interface.peer_node] = node
                    order.append(interface.peer_node)
        for node in reversed(order):
            children = [end for end in ends[node] if end.peer_node != self._above.get(node)]
            spans = [(end.link, end.link) for end in children]
            for end in children:
                spans += self._below[end.peer_node]
            self._below[node] = prefixes.joined(spans)

    def runs(self, node: str) -> list[prefixes.Run]:
        """The links that the node is not on itself: by which of its interfaces (their places) packets for them leave."""
        found: list[prefixes.Run] = []
        for place, end in enumerate(self._ends[node]):
            if end.peer_node == self._above.get(node):
                # All links but this one and those above are below.
                nearer = prefixes.joined([*self._below[node], (end.link, end.link)])
                found += [(first, last, place) for first, last in prefixes.between(nearer, self._links)]
            else:
                found += [(first, last, place) for first, last in self._below[end.peer_node]]
        return sorted(found)
