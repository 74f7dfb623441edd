"""Passing what arrives at one interface on to another, at layer 2: ingress qdisc, a filter that takes all, tc-mirred(8)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from testbed.errors import NetworkError
from testbed.hosts import namespaces
from testbed.net.netlink import Attributes, Netlink, TrafficObject, attributes

INGRESS, INGRESS_PARENT = 0xFFFF0000, 0xFFFFFFF1
_STATS_BASIC, _STATS_PACKETS64 = 1, 8
# Which attribute of a filter's options holds its actions. Kernels have one filter or the other, most have both.
_ACTIONS = {"matchall": 2, "u32": 7}


def redirect(wire: str, ends: Iterable[tuple[str, str]]) -> None:
    """From now on, what arrives at the first of two interfaces of the wire leaves through the second. Raises NetworkError."""
    from pyroute2 import IPRoute, NetlinkError, protocols  # not before: who only counts need not wait for it

    with namespaces.inside(wire), IPRoute(ext_ack=True) as network:
        for source, target in ends:
            here, there = map(socket.if_nametoindex, (source, target))
            action = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": there}
            filtered = {"parent": INGRESS, "prio": 1, "protocol": protocols.ETH_P_ALL, "action": action}
            try:
                network.tc("add", "ingress", here)
                try:
                    network.tc("add-filter", "matchall", here, **filtered)
                except NetlinkError as refusal:
                    if refusal.code != errno.ENOENT:
                        raise
                    # every packet has these 32 bits, whatever they are
                    network.tc("add-filter", "u32", here, target=0, keys=["0x0/0x0+0"], **filtered)
            except NetlinkError as refusal:
                raise NetworkError(f"{source}: tc ingress with mirred: {refusal.args[1]}") from None


def redirected(netlink: Netlink, source: int) -> tuple[int, int]:
    """Packets and bytes (network layer: the Ethernet header is off at ingress) that were redirected so far."""
    return redirects(netlink.filters(source, INGRESS)) or (0, 0)


def redirects(filters: Iterable[TrafficObject]) -> tuple[int, int] | None:
    """The same of the first of some filters that redirects; None: there is none."""
    for item in filters:
        actions = attributes(item.options).get(_ACTIONS.get(item.kind, 0))
        if actions:
            first = attributes(attributes(actions).get(1, b""))
            return counted(attributes(first.get(4, b"")))  # TCA_ACT_STATS
    return None


def counted(stats: Attributes) -> tuple[int, int]:
    """Packets and bytes of a statistics attribute (struct gnet_stats_basic and the 64-bit packet count beside it)."""
    total, packets = struct.unpack_from("=QI", stats.get(_STATS_BASIC, bytes(12)))
    if _STATS_PACKETS64 in stats:
        packets = struct.unpack("=Q", stats[_STATS_PACKETS64])[0]
    return packets, total
