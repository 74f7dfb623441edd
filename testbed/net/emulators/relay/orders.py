"""What the relay is told of a profile: plain values, and open files for what changes over time.

`Line.apply` (`testbed.net.emulators.relay.line`) is what takes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import structs

from testbed.net.emulators.relay.conditions import CoDelSettings, Conditions
from testbed.net.emulators.relay.impairments.delay import pack
from testbed.net.profile.jitter import table
from testbed.net.profile.loss import FourState, GilbertElliott

if TYPE_CHECKING:
    from testbed.net.profile.profile import Profile
    from testbed.net.profile.trace import Way


@contextlib.contextmanager
def relay_orders(profile: Profile, origin_s: float) -> Iterator[tuple[dict[str, dict[str, Any]], list[int]]]:
    """Both ways' conditions, and the open files that hold what changes over time, which may be long: open until the end."""
    conditions: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as closing:
        files: list[int] = []
        for way, direction in profile.ways.items():
            conditions[way] = direction_conditions(profile, way).plain()
            if (schedule := direction.schedule(way, origin_s)) is not None:
                file = closing.enter_context(open(os.memfd_create("schedule"), "wb"))
                conditions[way]["schedule"] = schedule.pack(file) | {"file": len(files)}
                file.flush()
                files.append(file.fileno())
        yield conditions, files


def direction_conditions(profile: Profile, way: Way) -> Conditions:
    """What does not change over time: what a `Direction` calls the same, and the rest."""
    direction = profile.ways[way]
    model, codel = direction.loss_model, direction.queue.codel
    kind = {GilbertElliott: "gilbert", FourState: "states"}
    same = {name: value for name, value in vars(direction).items() if name in Conditions._fields}
    others = {
        "jitter_table": pack(table(direction.jitter_law)) if direction.jitter_s else None,
        "loss_model": None if model is None else {"kind": kind[type(model)]} | structs.asdict(model),
        "queue_bytes": profile.queue_bytes(way),
        "codel": None if codel is None else CoDelSettings(codel.target_s, codel.interval_s),
    }
    return Conditions(**same | others)
