"""Passing what arrives at one interface on to another, at layer 2: ingress qdisc, a filter that takes all, tc-mirred(8)."""

from __future__ import annotations

import errno
import struct

from testbed.net.netlink import (
    CREATE,
    EXCLUSIVE,
    RTM_DELQDISC,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    TCA_KIND,
    TCA_OPTIONS,
    Attributes,
    Netlink,
    RefusedError,
    attribute,
    attributes,
    nested,
    text,
)

_INGRESS_PARENT, _INGRESS = 0xFFFFFFF1, 0xFFFF0000
_PRIORITY_1_ALL_PROTOCOLS = 1 << 16 | struct.unpack("=H", struct.pack("!H", 0x0003))[0]
_STOLEN, _EGRESS_REDIRECT = 4, 1
_STATS_BASIC, _STATS_PACKETS64 = 1, 8
# Which attribute of a filter's options holds its actions. Kernels have one filter or the other, most have both.
_ACTIONS = {"matchall": 2, "u32": 7}


def redirect(netlink: Netlink, source: int, target: int) -> None:
    """From now on, what arrives at interface *source* leaves through interface *target* (indices)."""
    netlink.traffic(
        RTM_NEWQDISC,
        CREATE | EXCLUSIVE,
        source,
        _INGRESS,
        _INGRESS_PARENT,
        0,
        text(TCA_KIND, "ingress"),
        what="tc ingress",
    )
    for kind, position in _ACTIONS.items():
        try:
            netlink.traffic(
                RTM_NEWTFILTER,
                CREATE | EXCLUSIVE,
                source,
                0,
                _INGRESS,
                _PRIORITY_1_ALL_PROTOCOLS,
                text(TCA_KIND, kind),
                nested(TCA_OPTIONS, *_match_everything(kind), nested(position, _mirred(target))),
                what=f"tc filter {kind} with mirred",
            )
            return
        except RefusedError as refusal:
            if refusal.number != errno.ENOENT or kind == "u32":
                raise


def end_redirect(netlink: Netlink, source: int) -> None:
    """Undoes `redirect`; nothing happens when there was none."""
    try:
        netlink.traffic(RTM_DELQDISC, 0, source, _INGRESS, _INGRESS_PARENT, 0, what="tc ingress")
    except RefusedError as refusal:
        if refusal.number not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
            raise


def redirected(netlink: Netlink, source: int) -> tuple[int, int]:
    """Packets and bytes (network layer: the Ethernet header is off at ingress) that were redirected so far."""
    for item in netlink.filters(source, _INGRESS):
        actions = attributes(item.options).get(_ACTIONS.get(item.kind, 0))
        if actions:
            first = attributes(attributes(actions).get(1, b""))
            return counted(attributes(first.get(4, b"")))  # TCA_ACT_STATS
    return 0, 0


def counted(stats: Attributes) -> tuple[int, int]:
    """Packets and bytes of a statistics attribute (struct gnet_stats_basic and the 64-bit packet count beside it)."""
    total, packets = struct.unpack_from("=QI", stats.get(_STATS_BASIC, bytes(12)))
    if _STATS_PACKETS64 in stats:
        packets = struct.unpack("=Q", stats[_STATS_PACKETS64])[0]
    return packets, total


def _match_everything(kind: str) -> list[bytes]:
    if kind == "matchall":
        return []
    # struct tc_u32_sel: terminal, one key; the key's mask 0 matches whatever stands at offset 0.
    selector = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + struct.pack("=IIii", 0, 0, 0, 0)
    return [attribute(5, selector)]


def _mirred(target: int) -> bytes:
    parameters = struct.pack("=IIiiiiI", 0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, target)  # struct tc_mirred
    return nested(1, text(1, "mirred"), nested(2, attribute(2, parameters)))
