"""Reordering: a packet skips the delay, and so overtakes those that are under way."""

from __future__ import annotations

from testbed.net.emulators.relay.impairments.contract import Context, Onward
from testbed.net.emulators.relay.packet import HEADERS


def reordering(context: Context, onward: Onward) -> Onward:
    """Takes a packet to the bottleneck at once."""
    probability, random, counted = context.conditions.reorder, context.chance.random, context.counted
    overtake = context.overtake
    if not probability:
        return onward

    def take(frame: bytes, now: float, copies: int = 1) -> None:
        if random() < probability:
            counted.reordered += 1
            overtake((now, frame, len(frame) - HEADERS, 1))
        else:
            onward(frame, now)

    return take
