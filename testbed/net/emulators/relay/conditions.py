"""What one direction of a link is put under, as the relay process takes it: plain values, which cross to it as JSON.

Standard library alone: the relay imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.schedule import Schedule


class CoDelSettings(NamedTuple):
    """The queue's management, RFC 8289."""

    target_s: float
    interval_s: float


class Conditions(NamedTuple):
    """One direction's; see `testbed.net.profile.conditions.Direction`, where every value is explained."""

    rate_bps: float | None = None
    delay_s: float = 0.0
    queue_bytes: int | None = None
    jitter_s: float = 0.0
    jitter_table: str | None = None  # see `impairments.delay.pack`
    jitter_reorders: bool = False
    loss: float = 0.0
    loss_model: dict[str, Any] | None = None  # ``kind``, and that model's parameters
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    ecn: bool = False
    codel: CoDelSettings | None = None
    overhead_bytes: int = 0
    mtu: int = 1500
    seed: int | None = None
    schedule: Schedule | Deliveries | None = None  # what changes over time; it crosses as a file

    def plain(self) -> dict[str, Any]:
        """For JSON, without the schedule."""
        return {name: value for name, value in self._asdict().items() if name != "schedule"}

    @classmethod
    def from_plain(cls, values: dict[str, Any], schedule: Schedule | Deliveries | None = None) -> Conditions:
        """What `plain` made."""
        codel = values.get("codel")
        return cls(**values | {"codel": codel and CoDelSettings(*codel), "schedule": schedule})
