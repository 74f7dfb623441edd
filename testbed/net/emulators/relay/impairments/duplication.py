"""Duplication: a packet comes twice."""

from __future__ import annotations

from testbed.net.emulators.relay.impairments.contract import Context, Onward


def duplication(context: Context, onward: Onward) -> Onward:
    """Makes two copies of a packet; see `loss` for how they part."""
    probability, random, counted = context.conditions.duplicate, context.chance.random, context.counted
    if not probability:
        return onward

    def take(frame: bytes, now: float, copies: int = 1) -> None:
        if random() < probability:
            copies = 2
            counted.duplicated += 1
        onward(frame, now, copies)

    return take
