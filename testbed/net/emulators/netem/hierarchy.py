"""Which queueing disciplines a direction gets: the outer netem, and the bottleneck inside of it.

1: netem  delay, jitter, loss, duplication, corruption, reordering
└ 2: netem  rate, queue                                            where that can do it: it is the most exact
└ 3: tbf  rate                                                     else
  └ 4: plug | 5: codel | 6: bfifo  queue                           of a trace's rate | CoDel | otherwise
└ 7: pfifo                                                         nothing to limit, and no netem allowed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from testbed.net.emulators.netem import options, qdiscs
from testbed.net.emulators.netem.options import Options
from testbed.net.emulators.netem.qdiscs import BFIFO, BUCKET, CODEL, NETEM, OUTER, PFIFO, PLUG, ROOT, Part

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.profile import Profile
    from testbed.net.profile.schedule import Schedule

BOTTLENECKS = {NETEM: "netem", BUCKET: "tbf", PFIFO: "pfifo"}
"""What may be inside of the outer netem, one at a time."""
_UNLIMITED_BYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """One direction's qdiscs. *stab*: what goes with the outer one, beside its options."""

    outer: Options
    stab: bytes
    inner: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All, from the outside in."""
        return (Part(OUTER, ROOT, "netem", self.outer), *self.inner)


def gives_rate(schedule: Schedule | Deliveries | None) -> bool:
    """Whether a trace is one of rates."""
    return schedule is not None and bool(schedule.opportunity_bytes or schedule.rates is not None)


def plan(
    profile: Profile,
    way: Literal["up", "down"],
    mtu: int,
    seed: int | None,
    schedule: Schedule | Deliveries | None,
    now: float,
) -> Plan:
    """What one direction is to be, under *schedule* as it is at *now*. *mtu*: network-layer bytes of a full-sized packet."""
    direction = profile.up if way == "up" else profile.down
    outer, inner = options.options(profile, way, mtu, seed)
    if schedule is not None:
        delay, loss = schedule.delay_at(now), schedule.loss_at(now)
        if delay is not None or loss is not None:
            outer = options.ordered(replace(outer, seed=None))
            outer = options.at_present(outer, delay, loss)
    rate_bps = direction.rate_bps
    if gives_rate(schedule):
        rate_bps = getattr(profile.steady(peak=True), way).rate_bps or 8.0 * _UNLIMITED_BYTES
    elif direction.queue.codel is None and not direction.duplicate:
        return Plan(outer, b"", (Part(NETEM, OUTER + 1, "netem", inner),))
    elif rate_bps is None:  # nothing ever waits
        return Plan(outer, b"", (Part(PFIFO, OUTER + 1, "pfifo", qdiscs.Fifo(inner.limit_packets)),))
    stab = qdiscs.size_offset(direction.overhead_bytes - qdiscs.ETHERNET_HEADER)
    bucket = Part(BUCKET, OUTER + 1, "tbf", qdiscs.bucket(rate_bps, mtu))
    return Plan(outer, stab, (bucket, _queue(profile, way, mtu, gives_rate(schedule))))


def _queue(profile: Profile, way: Literal["up", "down"], mtu: int, held: bool) -> Part:
    """The queue inside of a token bucket. One packet more than the profile's: the one that is being sent is in it, too."""
    direction = profile.up if way == "up" else profile.down
    waiting = profile.queue_bytes(way)
    packets = _UNLIMITED_BYTES // mtu if waiting is None else -(-waiting // mtu) + 1
    if held:
        return Part(PLUG, BUCKET + 1, "plug", qdiscs.Plug(packets * (mtu + qdiscs.ETHERNET_HEADER)))
    codel = direction.queue.codel
    if codel is not None:
        told = qdiscs.CoDelQueue(
            round(codel.target_s * 1e6), round(codel.interval_s * 1e6), packets, direction.ecn
        )
        return Part(CODEL, BUCKET + 1, "codel", told)
    overhead = direction.overhead_bytes * packets
    return Part(BFIFO, BUCKET + 1, "bfifo", qdiscs.Fifo((waiting or _UNLIMITED_BYTES) + mtu + overhead))
