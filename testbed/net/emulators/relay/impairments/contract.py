"""What an impairment is: it takes a packet from the one in front of it and hands it on to the one behind, or does not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple, Protocol

from testbed.net.emulators.relay.conditions import Conditions

Item = tuple[float, bytes, int, int]
"""Arrival at the bottleneck, frame, bytes of the network layer, packets (several in a super-packet)."""


class Counted:
    """What has happened to packets, ever; see `testbed.net.emulators.emulator.Counters`."""

    def __init__(self) -> None:
        self.packets = self.bytes = self.delivered = self.overrun = self.cleared = 0
        self.dropped_loss = self.dropped_queue = self.dropped_aqm = 0
        self.marked = self.duplicated = self.corrupted = self.reordered = 0


class Onward(Protocol):
    """Takes a packet that entered at *now*. In front of loss it may stand for two *copies*, of which loss takes one at most."""

    def __call__(self, frame: bytes, now: float, copies: int = 1, /) -> None: ...


class Context(NamedTuple):
    """What an impairment is made of. All of a line's draw from the one *chance*, in the order in which a packet meets them."""

    conditions: Conditions
    chance: Random
    counted: Counted
    travel: Callable[[float, float, bytes, int, int], None]
    """Takes a packet to the bottleneck, in order: when it entered, when it arrives, and the rest of an `Item`."""
    overtake: Callable[[Item], None]
    """The same for one that may arrive before those that entered before it."""
    under_way_bytes: Callable[[float], int]
    """What has entered and not left, at that time."""


Impairment = Callable[[Context, Onward], Onward]
"""What takes packets, and hands them on to the given one; that one itself where the conditions ask for nothing of it."""
