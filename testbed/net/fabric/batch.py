"""What a network is built by: requests to the routing part of the kernel, rtnetlink(7), many in one system call.

Changes to a network that stands are pyroute2's affair (`IPRoute`). A hundred nodes are 1,600 requests, which its messages take
0.2 s of processor to encode, more than all the rest of building them. So these are encoded here, under IPRoute's names for them
and their values; and a whole node is set up in one system call and one answer (`Netlink.request`).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal

from testbed.net.netlink import (
    CREATE,
    EXCLUSIVE,
    LINK,
    REPLACE,
    RTM_NEWQDISC,
    TC,
    Netlink,
    attribute,
    nested,
    text,
)

_NEWLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 20, 24, 28
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
# struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ROUTE = struct.Struct("=8BI")
_ROOT = 0xFFFFFFFF  # TC_H_ROOT
_UP, _NOARP, _MULTICAST = 0x1, 0x80, 0x1000
_PERMANENT = 0x80
_MAIN, _STATIC, _UNICAST = 254, 4, 1
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_GSO_MAX_SEGMENTS = 40


@dataclass(frozen=True)
class Peer:
    """The other end of a veth pair. `namespace`: an open descriptor of the namespace that it is in. `segments`: how many a packet
    that the end in this namespace takes may consist of."""

    name: str
    index: int
    mac: str
    namespace: int
    segments: int = 1


class Batch:
    """Requests for one namespace: the one of the thread that makes this. A context manager; `send` before the end."""

    def __init__(self, what: str) -> None:
        """`what` begins the message of every refusal."""
        self._what = what
        self._netlink = Netlink.here()
        self._waiting: list[tuple[int, int, bytes, str]] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._netlink.__exit__()

    def send(self) -> None:
        """Has the kernel do everything added since the last `send`. Raises NetworkError with its first refusal; what comes
        behind a refused request is done all the same."""
        waiting, self._waiting = self._waiting, []
        self._netlink.request(waiting)

    def _add(self, message: int, flags: int, body: bytes, what: str) -> None:
        self._waiting.append((message, flags, body, f"{self._what}: {what}"))

    def veth(self, name: str, index: int, mac: str, mtu: int, peer: Peer) -> None:
        """A veth pair: one end here, up and without ARP and multicast (nobody may talk on a link but those who use it), the other
        in another namespace, down."""
        flags, change = _UP | _NOARP, _UP | _NOARP | _MULTICAST
        there = LINK.pack(0, 0, peer.index, 0, 0) + _named(peer.name, peer.mac, mtu)
        there += attribute(28, struct.pack("=i", peer.namespace))  # IFLA_NET_NS_FD
        # IFLA_LINKINFO: kind, data: VETH_INFO_PEER
        kind = nested(18, text(1, "veth"), nested(2, attribute(1, there)))
        body = LINK.pack(0, 0, index, flags, change) + _named(name, mac, mtu) + kind
        if peer.segments > 1:
            body += attribute(_GSO_MAX_SEGMENTS, struct.pack("=I", peer.segments))
        self._add(_NEWLINK, CREATE | EXCLUSIVE, body, name)

    def link(self, command: Literal["set"], index: int, state: Literal["up"], ifalias: str = "") -> None:
        """An interface that goes up, with a note about it."""
        body = LINK.pack(0, 0, index, _UP, _UP) + (text(20, ifalias) if ifalias else b"")
        self._add(_NEWLINK, 0, body, f"interface {index}")

    def tc(self, command: Literal["replace"], kind: Literal["noqueue"], index: int) -> None:
        """An interface without a queue."""
        body = TC.pack(0, index, 0, _ROOT, 0) + text(1, kind)
        self._add(RTM_NEWQDISC, CREATE | REPLACE, body, f"interface {index}: {kind}")

    def addr(
        self, command: Literal["replace"], index: int, address: str, prefixlen: int, flags: int = 0
    ) -> None:
        """An address, with the route to its network."""
        given = ip_address(address)
        body = _ADDRESS.pack(_FAMILY[given.version], prefixlen, flags, 0, index)
        body += attribute(2, given.packed) + attribute(1, given.packed)
        self._add(_NEWADDR, CREATE | REPLACE, body, f"address {address}")

    def neigh(self, command: Literal["replace"], ifindex: int, dst: str, lladdr: str) -> None:
        """A neighbour that is known for good."""
        given = ip_address(dst)
        body = _NEIGHBOUR.pack(_FAMILY[given.version], ifindex, _PERMANENT, 0, 0)
        body += attribute(1, given.packed) + attribute(2, _packed(lladdr))
        self._add(_NEWNEIGH, CREATE | REPLACE, body, f"neighbour {dst}")

    def route(
        self,
        command: Literal["replace"],
        oif: int,
        dst: str,
        gateway: str | None = None,
        prefsrc: str | None = None,
        metrics: dict[str, str] | None = None,
        scope: int = 0,
    ) -> None:
        """A route through an interface, in place of one to the same destination."""
        network = ip_network(dst)
        family = _FAMILY[network.version]
        body = _ROUTE.pack(family, network.prefixlen, 0, 0, _MAIN, _STATIC, scope, _UNICAST, 0)
        body += attribute(1, network.network_address.packed) + attribute(4, struct.pack("=I", oif))
        if gateway:
            body += attribute(5, ip_address(gateway).packed)
        if prefsrc:
            body += attribute(7, ip_address(prefsrc).packed)
        if metrics:
            body += nested(8, text(16, metrics["cc_algo"]))  # RTA_METRICS: RTAX_CC_ALGO
        self._add(_NEWROUTE, CREATE | REPLACE, body, f"route to {dst}")


def _named(name: str, mac: str, mtu: int) -> bytes:
    # IFLA_NUM_[TR]X_QUEUES: one of each, none waits there.
    numbers = ((4, mtu), (31, 1), (32, 1))
    values = (attribute(kind, struct.pack("=I", value)) for kind, value in numbers)
    return text(3, name) + attribute(1, _packed(mac)) + b"".join(values)


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
