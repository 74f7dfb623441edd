"""What passed a link under netem, out of the kernel's counters of its queueing disciplines (gnet_stats)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from testbed.errors import NetworkError
from testbed.net.emulators.emulator import Counters
from testbed.net.emulators.netem.options import BOTTLENECKS, ECN, QOPT
from testbed.net.emulators.netem.qdiscs import BUCKET, CODEL, OUTER, find, get
from testbed.net.emulators.netem.redirect import counted
from testbed.net.netlink import Netlink, TrafficObject, attributes

_STATS_OWN = 4  # TCA_STATS_APP


class Dropped(NamedTuple):
    """Packets that a bottleneck has dropped in all; of these, by CoDel's law; and packets that CoDel has marked."""

    packets: int = 0
    by_codel: int = 0
    marked: int = 0

    def plus(self, other: Dropped) -> Dropped:
        """Both together."""
        return Dropped(*(mine + its for mine, its in zip(self, other, strict=True)))


def outer_and_bottleneck(
    netlink: Netlink, ifindex: int
) -> tuple[TrafficObject, TrafficObject, TrafficObject | None]:
    """The outer netem, the bottleneck, and the CoDel queue where there is one. Raises NetworkError where one is gone."""
    for handle in BOTTLENECKS:
        if (inner := find(netlink, ifindex, handle)) is not None:
            codel = find(netlink, ifindex, CODEL) if handle == BUCKET else None
            return get(netlink, ifindex, OUTER), inner, codel
    raise NetworkError(f"interface {ifindex}: what limits its rate is gone")


def drops(qdisc: TrafficObject) -> int:
    """Packets that a qdisc says were dropped: its own, and those of what is inside of it."""
    return _queue(qdisc)[2]


def dropped_by(bottleneck: TrafficObject, codel: TrafficObject | None) -> Dropped:
    """What a bottleneck, with CoDel inside of it or not, has dropped and marked since it was made."""
    if codel is None:
        return Dropped(drops(bottleneck))
    # struct tc_codel_xstats: the sixth is what its limit dropped, the seventh what it marked.
    values = struct.unpack_from("=IIIIiIIII", codel.stats.get(_STATS_OWN, bytes(36)))
    return Dropped(drops(bottleneck), drops(codel) - values[5], values[6])


def link_counters(packets: int, total: int, outer: TrafficObject, bottleneck: Dropped) -> Counters:
    """One way's counters. *packets*, *total*: that entered, and their bytes; *bottleneck*: of all that it ever had."""
    held, _, dropped, skipped = _queue(outer)
    delivered, _ = counted(outer.stats)  # packets that skip the delay skip the inner one, too
    queue, aqm, marked = bottleneck
    lost = max(0, dropped - queue)  # the outer one counts as its own what the inner one dropped,
    copies = QOPT.unpack_from(outer.options)[4] > 0
    if any(attributes(outer.options[QOPT.size :]).get(ECN, b"")):
        # and what it marks: then, lost is what is missing
        seen = lost
        lost = min(lost, max(0, packets - delivered - held - queue))
        marked += seen - lost
        copies = False  # they hide the losses: neither can be told
    return Counters(
        packets,
        total,
        lost,
        queue - aqm,
        0.0,
        delivered=delivered,
        dropped_aqm=aqm,
        marked=marked,
        duplicated=max(0, delivered + held + queue + lost - packets) if copies else 0,
        reordered=skipped,
    )


def waiting(outer: TrafficObject) -> int:
    """Packets in the outer netem and all that is inside of it."""
    return _queue(outer)[0]


def _queue(qdisc: TrafficObject) -> tuple[int, int, int, int]:
    """struct gnet_stats_queue: packets and bytes that wait, drops, and requeues, which are netem's reordered packets."""
    qlen, backlog, drops, requeues = struct.unpack_from("=IIII", qdisc.stats.get(3, bytes(20)))
    return qlen, backlog, drops, requeues
