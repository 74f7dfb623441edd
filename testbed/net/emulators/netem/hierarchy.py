"""Which queueing disciplines a direction gets: the outer netem, and the bottleneck inside of it.

1: netem  delay, jitter, loss, duplication, corruption, reordering
└ 2: netem  rate, queue                                            where that can do it: it is the most exact
└ 3: tbf  rate                                                     else
  └ 4: plug | 5: codel | 6: bfifo  queue                           of a trace's rate | CoDel | otherwise
└ 7: pfifo                                                         nothing to limit, and no netem allowed
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from testbed.net.emulators.netem import options, qdiscs
from testbed.net.emulators.netem.options import Options
from testbed.net.emulators.netem.qdiscs import BFIFO, BUCKET, CODEL, NETEM, OUTER, PFIFO, PLUG, ROOT, Qdisc

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.profile import Profile
    from testbed.net.profile.schedule import Schedule
    from testbed.net.profile.trace import Way

BOTTLENECKS = {NETEM: "netem", BUCKET: "tbf", PFIFO: "pfifo"}
"""What may be inside of the outer netem, one at a time."""
_UNLIMITED_BYTES = 1 << 30


@dataclass(frozen=True)
class Hierarchy:
    """One direction's qdiscs. *stab*: what goes with the outer one, beside its options."""

    outer: Options
    stab: bytes
    inner: tuple[Qdisc, ...]

    @property
    def qdiscs(self) -> tuple[Qdisc, ...]:
        """All, from the outside in."""
        return (Qdisc(OUTER, ROOT, "netem", self.outer), *self.inner)


def hierarchy(
    profile: Profile,
    way: Way,
    mtu: int,
    seed: int | None,
    schedule: Schedule | Deliveries | None,
    now: float,
) -> Hierarchy:
    """What one direction is to be, under *schedule* as it is at *now*. *mtu*: network-layer bytes of a full-sized packet."""
    direction = profile.ways[way]
    outer, inner = options.options(profile, way, mtu, seed)
    if schedule is not None:
        delay, loss = schedule.delay_at(now), schedule.loss_at(now)
        if delay is not None or loss is not None:
            outer = options.ordered(replace(outer, seed=None))
            outer = options.at_present(outer, delay, loss)
    rate_bps, traced = direction.rate_bps, schedule is not None and schedule.gives_rate
    if traced:
        rate_bps = profile.steady(peak=True).ways[way].rate_bps or 8.0 * _UNLIMITED_BYTES
    elif direction.queue.codel is None and not direction.duplicate:
        return Hierarchy(outer, b"", (Qdisc(NETEM, OUTER + 1, "netem", inner),))
    elif rate_bps is None:  # nothing ever waits
        return Hierarchy(outer, b"", (Qdisc(PFIFO, OUTER + 1, "pfifo", qdiscs.Fifo(inner.limit_packets)),))
    stab = qdiscs.size_offset(direction.overhead_bytes - qdiscs.ETHERNET_HEADER)
    bucket = Qdisc(BUCKET, OUTER + 1, "tbf", qdiscs.bucket(rate_bps, mtu))
    return Hierarchy(outer, stab, (bucket, _queue(profile, way, mtu, traced)))


def _queue(profile: Profile, way: Way, mtu: int, held: bool) -> Qdisc:
    """The queue inside of a token bucket. One packet more than the profile's: the one that is being sent is in it, too."""
    direction = profile.ways[way]
    waiting = profile.queue_bytes(way)
    packets = _UNLIMITED_BYTES // mtu if waiting is None else -(-waiting // mtu) + 1
    if held:
        return Qdisc(PLUG, BUCKET + 1, "plug", qdiscs.Plug(packets * (mtu + qdiscs.ETHERNET_HEADER)))
    codel = direction.queue.codel
    if codel is not None:
        times_us = round(codel.target_s * 1e6), round(codel.interval_s * 1e6)
        return Qdisc(CODEL, BUCKET + 1, "codel", qdiscs.CoDelQueue(*times_us, packets, direction.ecn))
    overhead = direction.overhead_bytes * packets
    return Qdisc(BFIFO, BUCKET + 1, "bfifo", qdiscs.Fifo((waiting or _UNLIMITED_BYTES) + mtu + overhead))
