"""What `Schedule.pack` and `Deliveries.pack` wrote for another process, there.

Standard library alone: the relay imports it.
"""

from __future__ import annotations

import mmap
from typing import Any

from testbed.net.profile.columns import Milliseconds
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.schedule import Schedule


def unpack(description: dict[str, Any], file: int) -> Schedule | Deliveries:
    """The schedule that `pack` wrote to the file with this descriptor. The numbers stay in the file, which may be closed."""
    count = description["count"]
    mapped = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))
    if description["kind"] == "deliveries":
        return Deliveries(
            mapped[: 4 * count].cast("I"),
            description["opportunity_bytes"],
            offset_s=description["offset_s"],
            origin_s=description["origin_s"],
        )
    size = 4 if description["milliseconds"] else 8
    times = mapped[: size * count]
    columns: dict[str, Any] = {
        name: mapped[(size + 4 * i) * count : (size + 4 + 4 * i) * count].cast("f")
        for i, name in enumerate(description["columns"])
    }
    rest = {key: description[key] for key in ("length_s", "scale", "loop", "offset_s", "origin_s")}
    return Schedule(Milliseconds(times.cast("I")) if size == 4 else times.cast("d"), **columns, **rest)
