"""Corruption: one bit of a packet is flipped."""

from __future__ import annotations

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.impairments.contract import Context, Onward


def corruption(context: Context, onward: Onward) -> Onward:
    """Flips any bit behind the Ethernet header; see `packet.corrupt`."""
    probability, chance, counted = context.conditions.corrupt, context.chance, context.counted
    if not probability:
        return onward

    def take(frame: bytes, now: float, copies: int = 1) -> None:
        if chance.random() < probability:
            frame = packet.corrupt(frame, chance.getrandbits(32))
            counted.corrupted += 1
        onward(frame, now)

    return take
