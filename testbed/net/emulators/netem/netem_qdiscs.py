"""Queueing disciplines that netem's links are made of, put in place and read back."""

from __future__ import annotations

from testbed.errors import NetworkError
from testbed.net.emulators.netem.qdiscs import OUTER, Part
from testbed.net.fabric.netlink import (
    RTM_NEWQDISC,
    TCA_KIND,
    TCA_OPTIONS,
    Netlink,
    TrafficObject,
    attribute,
    text,
)


def put(netlink: Netlink, ifindex: int, part: Part, flags: int, stab: bytes = b"") -> None:
    """Asks for a qdisc. *flags*: whether it is made, replaced or changed (rtnetlink(7)); *stab*: its size table, encoded.
    Raises NetworkError where the kernel refuses."""
    told = (text(TCA_KIND, part.kind), attribute(TCA_OPTIONS, part.told.encode()), stab)
    netlink.traffic(RTM_NEWQDISC, flags, ifindex, part.handle, part.parent, 0, *told, what=f"tc {part.kind}")


def find(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject | None:
    """The qdisc with that handle; None where there is none, or what is outermost is no netem."""
    found = netlink.qdisc(ifindex, handle)
    return found if found is not None and (handle != OUTER or found.kind == "netem") else None


def get(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject:
    """The same. Raises NetworkError where there is none."""
    found = find(netlink, ifindex, handle)
    if found is None:
        raise NetworkError(f"interface {ifindex}: its qdisc {handle >> 16}: is gone")
    return found
