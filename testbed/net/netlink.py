"""rtnetlink(7) messages, byte for byte: traffic control, and links, addresses, neighbours and routes, many at a time.

Why not a library: netem's options have to be sent and read back in full (64-bit times and rates, distribution tables, seeds),
which those we know encode in part only.

A `Batch` puts messages one behind the other and hands them to the kernel together. The kernel works through all of them in order
and answers only what it refuses and the last one, so a whole node is set up in one system call and one answer.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from testbed.errors import NetworkError
from testbed.hosts.namespaces import call_in_scratch, call_inside

RTM_GETLINK = 18
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_GETTFILTER = 44, 46
CREATE, EXCLUSIVE, REPLACE = 0x400, 0x200, 0x100  # NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

TCA_KIND, TCA_OPTIONS, TCA_STATS2 = 1, 2, 7
_REQUEST, _ACK, _ECHO, _DUMP = 0x1, 0x4, 0x8, 0x300
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _ACK_TLVS = 270, 10, 11, 0x200
_HEADER = struct.Struct("=IHHII")
_TC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_TYPE_MASK = 0x3FFF  # without the flags NESTED and NET_BYTEORDER

Attributes = dict[int, bytes]


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute: length, type, value, padded to four bytes."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that consists of attributes."""
    return attribute(kind, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a zero-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data: bytes) -> Attributes:
    """The attributes in *data*, by type; a repeated one keeps its last value."""
    found: Attributes = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4 or at + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


@dataclass(frozen=True)
class TrafficObject:
    """A qdisc or filter as the kernel describes it."""

    ifindex: int
    handle: int
    parent: int
    kind: str
    options: bytes
    stats: Attributes


@dataclass(frozen=True)
class Interface:
    """An interface as the kernel describes it."""

    index: int
    mtu: int
    tx_dropped: int
    alias: str = ""  # what somebody noted about it (ip-link(8))


class Netlink:
    """A connection to the routing part of the kernel, inside one namespace. A context manager."""

    def __init__(self, namespace: str | None, connection: socket.socket | None = None) -> None:
        """*namespace*: a name under /run/netns, or None for a scratch namespace that ends with this connection.

        *connection*: one that is open already; the namespace is then its own.
        """
        if connection is None:
            connection = call_inside(namespace, _open) if namespace is not None else call_in_scratch(_open)
        self._socket = connection
        self._sequence = 0

    @classmethod
    def here(cls) -> Netlink:
        """A connection inside the namespace that this process is in."""
        return cls(None, _open())

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def interface(self, name: str) -> Interface:
        """Raises NetworkError when the namespace has no such interface."""
        body = _LINK.pack(0, 0, 0, 0, 0) + text(3, name)
        (reply,) = self._exchange(RTM_GETLINK, 0, body, f"interface {name}")
        found = attributes(reply[_LINK.size :])
        dropped = (
            struct.unpack_from("=Q", found[23], 7 * 8)[0] if 23 in found else 0
        )  # IFLA_STATS64: rtnl_link_stats64
        alias = found.get(20, b"").rstrip(b"\0").decode(errors="replace")  # IFLA_IFALIAS
        return Interface(_LINK.unpack_from(reply)[2], struct.unpack("=I", found[4])[0], dropped, alias)

    def traffic(
        self,
        message: int,
        flags: int,
        ifindex: int,
        handle: int,
        parent: int,
        info: int,
        *attrs: bytes,
        what: str,
    ) -> None:
        """One traffic control request; raises NetworkError beginning with *what* when the kernel refuses."""
        body = _TC.pack(0, ifindex, handle, parent, info) + b"".join(attrs)
        self._exchange(message, flags | _ACK, body, what)

    def change(self, ifindex: int, changes: list[tuple[int, int, bytes]]) -> None:
        """Changes qdiscs in place, (handle, parent, attributes) each, all with one system call. Raises NetworkError."""
        whole = b""
        for handle, parent, attrs in changes:
            self._sequence += 1
            body = _TC.pack(0, ifindex, handle, parent, 0) + attrs
            flags = _REQUEST | _ACK
            whole += _HEADER.pack(_HEADER.size + len(body), RTM_NEWQDISC, flags, self._sequence, 0) + body
        last = self._sequence
        self._socket.send(whole)
        while True:
            for kind, flags, sequence, payload in self._received():
                if kind == _ERROR:
                    _raise_refusal(payload, flags, f"interface {ifindex}: tc qdisc change")
                    if sequence == last:
                        return

    def qdiscs(self, ifindex: int) -> list[TrafficObject]:
        """All queueing disciplines of an interface."""
        return self._dump(RTM_GETQDISC, ifindex, 0)

    def qdisc(self, ifindex: int, handle: int) -> TrafficObject | None:
        """The queueing discipline of that handle, asked for by itself: a dump would list those of every interface there is."""
        body = _TC.pack(0, ifindex, handle, 0, 0)
        try:
            (reply,) = self._exchange(
                RTM_GETQDISC, _ECHO, body, f"interface {ifindex}: qdisc {handle >> 16:x}:"
            )
        except RefusedError:
            return None
        return _described(reply)

    def filters(self, ifindex: int, parent: int) -> list[TrafficObject]:
        """All filters of an interface below *parent*."""
        return self._dump(RTM_GETTFILTER, ifindex, parent)

    def _dump(self, message: int, ifindex: int, parent: int) -> list[TrafficObject]:
        replies = self._exchange(
            message, _DUMP, _TC.pack(0, ifindex, 0, parent, 0), f"interface {ifindex}: dump"
        )
        return [found for found in map(_described, replies) if found.ifindex == ifindex]

    def _exchange(self, message: int, flags: int, body: bytes, what: str) -> list[bytes]:
        """Sends one request; the bodies of what came back."""
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), message, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        replies: list[bytes] = []
        while True:
            for kind, reply_flags, sequence, payload in self._received():
                if sequence != self._sequence:
                    continue
                if kind == _ERROR:
                    _raise_refusal(payload, reply_flags, what)
                    return replies
                if kind == _DONE:
                    return replies
                replies.append(payload)
                if not flags & (_ACK | _DUMP):
                    return replies

    def _received(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, sequence number and body of the messages of one datagram."""
        data = self._socket.recv(1 << 18)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            yield kind, flags, sequence, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def _described(reply: bytes) -> TrafficObject:
    _, index, handle, up, _ = _TC.unpack_from(reply)
    found = attributes(reply[_TC.size :])
    kind = found.get(TCA_KIND, b"").rstrip(b"\0").decode(errors="replace")
    stats = attributes(found.get(TCA_STATS2, b""))
    return TrafficObject(index, handle, up, kind, found.get(TCA_OPTIONS, b""), stats)


class RefusedError(NetworkError):
    """The kernel refused a request; `number` is its errno."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def _raise_refusal(payload: bytes, flags: int, what: str) -> None:
    if reason := _reason(payload, flags):
        raise RefusedError(f"{what}: {reason}", -struct.unpack_from("=i", payload)[0])


def _reason(payload: bytes, flags: int) -> str:
    """Why the kernel refused; empty where it did not."""
    number = -struct.unpack_from("=i", payload)[0]
    if number == 0:
        return ""
    words = b""
    if flags & _ACK_TLVS:  # the kernel's own words (NLMSGERR_ATTR_MSG), behind the echoed header
        words = attributes(payload[4 + _HEADER.size :]).get(1, b"").rstrip(b"\0")
    return f"{os.strerror(number)}: {words.decode(errors='replace')}" if words else os.strerror(number)


def _open(patience_s: float = 10) -> socket.socket:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    connection.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
    connection.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
    connection.settimeout(patience_s)
    connection.bind((0, 0))
    return connection


_NEWLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 20, 24, 28
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_ROOT = 0xFFFFFFFF  # TC_H_ROOT
_UP, _NOARP, _MULTICAST = 0x1, 0x80, 0x1000
_NODAD = 0x02
_PERMANENT = 0x80
_MAIN, _STATIC, _UNIVERSE, _LINK_SCOPE, _UNICAST = 254, 4, 0, 253, 1
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_GSO_MAX_SEGMENTS = 40
_ONE_QUEUE = attribute(31, struct.pack("=I", 1)) + attribute(
    32, struct.pack("=I", 1)
)  # IFLA_NUM_[TR]X_QUEUES: none waits there
_CHUNK_BYTES = 64_000
_ANSWER_S = 60.0


@dataclass(frozen=True)
class Peer:
    """The other end of a veth pair. `namespace`: an open descriptor of the namespace that it is in. `segments`: how many a packet
    that the end in this namespace takes may consist of."""

    name: str
    index: int
    mac: bytes
    namespace: int
    segments: int = 1


class Batch:
    """Requests for one namespace: the one of the thread that makes this. A context manager; `send` before the end."""

    def __init__(self, what: str) -> None:
        """`what` begins the message of every refusal."""
        self._what = what
        self._socket = _open(_ANSWER_S)
        self._waiting: list[tuple[int, int, bytes, str]] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add(self, message: int, flags: int, body: bytes, what: str) -> None:
        """One more request; *what* names it where it is refused."""
        self._waiting.append((message, flags | _REQUEST, body, what))

    def send(self) -> None:
        """Has the kernel do everything added since the last `send`.

        Raises NetworkError with its first refusal; what comes behind a refused request is done all the same.
        """
        waiting, self._waiting = self._waiting, []
        at = 0
        while at < len(waiting):
            pieces: list[bytes] = []
            size, first = 0, at
            while at < len(waiting) and size < _CHUNK_BYTES:
                message, flags, body, _ = waiting[at]
                at += 1
                size += _HEADER.size + len(body)
                pieces += (_HEADER.pack(_HEADER.size + len(body), message, flags, at, 0), body)
            message, flags, body, _ = waiting[at - 1]  # an answer to the last one says that all are done
            pieces[-2] = _HEADER.pack(_HEADER.size + len(body), message, flags | _ACK, at, 0)
            try:
                self._socket.send(b"".join(pieces))
                self._await([what for *_, what in waiting[first:at]], first + 1, at)
            except OSError as error:
                raise NetworkError(f"{self._what}: the kernel does not answer: {error}") from None

    def _await(self, names: list[str], first: int, last: int) -> None:
        refusal = ""
        while True:
            data = self._socket.recv(1 << 16)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
                payload = data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
                if kind != _ERROR or not first <= sequence <= last:
                    continue
                if not refusal and (reason := _reason(payload, flags)):
                    refusal = f"{self._what}: {names[sequence - first]}: the kernel refused: {reason}"
                if sequence == last:
                    if refusal:
                        raise NetworkError(refusal)
                    return

    def veth(self, name: str, index: int, mac: bytes, mtu: int, peer: Peer, what: str) -> None:
        """A veth pair: one end here, up and without ARP and multicast (nobody may talk on a link but those who use it), the other
        in another namespace, down."""
        flags, change = _UP | _NOARP, _UP | _NOARP | _MULTICAST
        there = _LINK.pack(0, 0, peer.index, 0, 0) + _named(peer.name, peer.mac, mtu) + _ONE_QUEUE
        there += attribute(28, struct.pack("=i", peer.namespace))  # IFLA_NET_NS_FD
        kind = nested(
            18, text(1, "veth"), nested(2, attribute(1, there))
        )  # IFLA_LINKINFO: kind, data: VETH_INFO_PEER
        body = _LINK.pack(0, 0, index, flags, change) + _named(name, mac, mtu) + _ONE_QUEUE + kind
        if peer.segments > 1:
            body += attribute(_GSO_MAX_SEGMENTS, struct.pack("=I", peer.segments))
        self.add(_NEWLINK, CREATE | EXCLUSIVE, body, what)

    def up(self, index: int, what: str, alias: str = "") -> None:
        """An interface, up; *alias*: a note about it (IFLA_IFALIAS)."""
        body = _LINK.pack(0, 0, index, _UP, _UP) + (text(20, alias) if alias else b"")
        self.add(_NEWLINK, 0, body, what)

    def down(self, index: int, what: str) -> None:
        """An interface, down: the kernel forgets its routes and neighbours, and IPv6's addresses."""
        self.add(_NEWLINK, 0, _LINK.pack(0, 0, index, 0, _UP), what)

    def ready(self, index: int, what: str) -> None:
        """An interface that is up, and whose other end is: it may send from now on.

        When only its other end comes up, the kernel lets it send when it gets round to it (linkwatch: a hundred interfaces a
        second), and drops what is sent before. A queueing discipline, here the one it will have anyway, makes it look at once.
        """
        body = _TC.pack(0, index, 0, _ROOT, 0) + text(1, "noqueue")
        self.add(RTM_NEWQDISC, CREATE | REPLACE, body, what)

    def super_packets(self, index: int, segments: int, what: str) -> None:
        """How many segments a packet that an interface takes may consist of (IFLA_GSO_MAX_SEGS)."""
        body = _LINK.pack(0, 0, index, 0, 0) + attribute(_GSO_MAX_SEGMENTS, struct.pack("=I", segments))
        self.add(_NEWLINK, 0, body, what)

    def mtu(self, index: int, size: int, what: str) -> None:
        """Bytes of the network layer in an interface's largest packet (IFLA_MTU)."""
        body = _LINK.pack(0, 0, index, 0, 0) + attribute(4, struct.pack("=I", size))
        self.add(_NEWLINK, 0, body, what)

    def address(self, index: int, address: str, bits: int, what: str, again: bool = False) -> None:
        """An address, with the route to its network; refused where it is there, unless *again*. IPv6: used at once, nobody
        is asked whether it is taken."""
        given = ip_address(address)
        value = given.packed
        body = _ADDRESS.pack(_FAMILY[given.version], bits, _NODAD if given.version == 6 else 0, 0, index)
        self.add(
            _NEWADDR,
            CREATE | (REPLACE if again else EXCLUSIVE),
            body + attribute(2, value) + attribute(1, value),
            f"{what}: address {address}",
        )

    def neighbour(self, index: int, address: str, mac: bytes, what: str) -> None:
        """A neighbour that is known for good: no ARP packet and no neighbour solicitation asks for it."""
        given = ip_address(address)
        body = _NEIGHBOUR.pack(_FAMILY[given.version], index, _PERMANENT, 0, 0)
        body += attribute(1, given.packed) + attribute(2, mac)
        self.add(_NEWNEIGH, CREATE | REPLACE, body, f"{what}: neighbour {address}")

    def route(
        self,
        index: int,
        destination: str,
        what: str,
        *,
        via: str | None = None,
        source: str | None = None,
        congestion: str | None = None,
    ) -> None:
        """A route through an interface, in place of one to the same destination. `congestion`: the congestion control of what
        takes it."""
        network = ip_network(destination)
        scope = _UNIVERSE if via or network.version == 6 else _LINK_SCOPE
        body = _ROUTE.pack(
            _FAMILY[network.version], network.prefixlen, 0, 0, _MAIN, _STATIC, scope, _UNICAST, 0
        )
        body += attribute(1, network.network_address.packed) + attribute(4, struct.pack("=I", index))
        if via:
            body += attribute(5, ip_address(via).packed)
        if source:
            body += attribute(7, ip_address(source).packed)
        if congestion:
            body += nested(8, text(16, congestion))  # RTA_METRICS: RTAX_CC_ALGO
        self.add(_NEWROUTE, CREATE | REPLACE, body, f"{what}: route to {destination}")


def _named(name: str, mac: bytes, mtu: int) -> bytes:
    return text(3, name) + attribute(1, mac) + attribute(4, struct.pack("=I", mtu))
