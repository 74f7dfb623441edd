"""Traffic control over rtnetlink(7), byte for byte: what netem's links are told and read back.

Why not pyroute2, which does the rest (`testbed.net.fabric`): it knows of netem neither 64-bit times and rates nor loss models,
distribution tables and seeds, of statistics no 64-bit counts; and what follows a trace, every few milliseconds, is a process
of its own that has not got the time to load it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from testbed.errors import NetworkError
from testbed.hosts.namespaces import call_in_scratch, call_inside

RTM_GETLINK = 18
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_GETTFILTER = 46
CREATE, EXCLUSIVE, REPLACE = 0x400, 0x200, 0x100  # NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE

TCA_KIND, TCA_OPTIONS, TCA_STATS2 = 1, 2, 7
_REQUEST, _ACK, _ECHO, _DUMP = 0x1, 0x4, 0x8, 0x300
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _ACK_TLVS = 270, 10, 11, 0x200
_HEADER = struct.Struct("=IHHII")
TC = struct.Struct("=BxxxiIII")  # struct tcmsg: family, index, handle, parent, info
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ANSWER_S = 60
_AT_ONCE = 200  # requests: their bytes have to fit into the socket's buffer
_TYPE_MASK = 0x3FFF  # without the flags NESTED and NET_BYTEORDER

Attributes = dict[int, bytes]
Request = tuple[int, int, bytes, str]
"""Message type, flags, body, and what names it where it is refused."""


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
        body = LINK.pack(0, 0, 0, 0, 0) + text(3, name)
        (reply,) = self._exchange(RTM_GETLINK, 0, body, f"interface {name}")
        found = attributes(reply[LINK.size :])
        return Interface(LINK.unpack_from(reply)[2], struct.unpack("=I", found[4])[0])

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
        body = TC.pack(0, ifindex, handle, parent, info) + b"".join(attrs)
        self._exchange(message, flags | _ACK, body, what)

    def request(self, requests: Sequence[Request]) -> None:
        """Many changes, hundreds with one system call: the kernel works through all of them in order and answers only what it
        refuses and the last one. Raises RefusedError with its first refusal; what comes behind that is done all the same."""
        refusals: list[RefusedError] = []
        for first in range(0, len(requests), _AT_ONCE):
            chunk, data = requests[first : first + _AT_ONCE], bytearray()
            for place, (message, flags, body, _) in enumerate(chunk, 1):
                flags |= _REQUEST | (_ACK if place == len(chunk) else 0)
                data += (
                    _HEADER.pack(_HEADER.size + len(body), message, flags, self._sequence + place, 0) + body
                )
            before, self._sequence = self._sequence, self._sequence + len(chunk)
            self._socket.send(data)
            done = False
            while not done:
                for kind, flags, sequence, payload in self._received():
                    if kind != _ERROR or sequence <= before:
                        continue
                    done = done or sequence == self._sequence
                    try:
                        _raise_refusal(payload, flags, chunk[sequence - before - 1][3])
                    except RefusedError as refusal:
                        refusals.append(refusal)
        if refusals:
            raise refusals[0]

    def change(self, ifindex: int, changes: list[tuple[int, int, bytes]]) -> None:
        """Changes qdiscs in place, (handle, parent, attributes) each, all with one system call. Raises NetworkError."""
        what = f"interface {ifindex}: tc qdisc change"
        bodies = [TC.pack(0, ifindex, handle, parent, 0) + attrs for handle, parent, attrs in changes]
        self.request([(RTM_NEWQDISC, 0, body, what) for body in bodies])

    def qdisc(self, ifindex: int, handle: int) -> TrafficObject | None:
        """The queueing discipline of that handle, asked for by itself: a dump would list those of every interface there is."""
        body = TC.pack(0, ifindex, handle, 0, 0)
        try:
            (reply,) = self._exchange(
                RTM_GETQDISC, _ECHO, body, f"interface {ifindex}: qdisc {handle >> 16:x}:"
            )
        except RefusedError:
            return None
        return described(reply)

    def filters(self, ifindex: int, parent: int) -> list[TrafficObject]:
        """All filters of an interface below *parent*."""
        body = TC.pack(0, ifindex, 0, parent, 0)
        replies = self._exchange(RTM_GETTFILTER, _DUMP, body, f"interface {ifindex}: filters")
        return [found for found in map(described, replies) if found.ifindex == ifindex]

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
        try:
            data = self._socket.recv(1 << 18)
        except OSError as error:
            raise NetworkError(f"the kernel does not answer: {error}") from None
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            yield kind, flags, sequence, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def described(reply: bytes) -> TrafficObject:
    """A qdisc or filter, of the body of a message that has one."""
    _, index, handle, up, _ = TC.unpack_from(reply)
    found = attributes(reply[TC.size :])
    kind = found.get(TCA_KIND, b"").rstrip(b"\0").decode(errors="replace")
    stats = attributes(found.get(TCA_STATS2, b""))
    return TrafficObject(index, handle, up, kind, found.get(TCA_OPTIONS, b""), stats)


class RefusedError(NetworkError):
    """The kernel refused a request; `number` is its errno."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def _raise_refusal(payload: bytes, flags: int, what: str) -> None:
    """Raises RefusedError where that is what the answer says."""
    number = -struct.unpack_from("=i", payload)[0]
    if number == 0:
        return
    reason = os.strerror(number)
    if flags & _ACK_TLVS:  # the kernel's own words (NLMSGERR_ATTR_MSG), behind the echoed header
        words = attributes(payload[4 + _HEADER.size :]).get(1, b"").rstrip(b"\0")
        reason += f": {words.decode(errors='replace')}" if words else ""
    raise RefusedError(f"{what}: {reason}", number)


def _open() -> socket.socket:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    connection.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
    connection.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
    connection.settimeout(_ANSWER_S)
    connection.bind((0, 0))
    return connection
