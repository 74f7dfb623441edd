"""Drop-tail: what finds the queue full is dropped; of a super-packet, what there is no room for."""

from __future__ import annotations

from testbed.net.emulators.relay import packet
from testbed.net.emulators.relay.impairments.contract import Item


def admitted(item: Item, room: float) -> Item | None:
    """What fits of *item* into *room* bytes, which are too few for all of it; None: nothing."""
    arrival, frame, size, count = item
    fits = int(room // (size / count)) if count > 1 else 0
    if fits <= 0:
        return None
    frame = packet.cut(frame, 0, fits)
    kept = packet.measure(frame)[0] if fits > 1 else len(frame) - packet.HEADERS
    return arrival, frame, kept, fits
