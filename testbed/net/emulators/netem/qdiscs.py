"""Queueing disciplines of netem's links: the kernel's token bucket, tc-tbf(8), and the queues that it serves; their options,
where their read-back differs, and how any is put in place and read back.

A token bucket is a bottleneck for what two nested netems cannot do. A netem's rate gives every packet its time of leaving when it
arrives, which no later change moves, and it holds no other queue; newer kernels refuse a netem that duplicates where there is
another below it. A token bucket looks at the head of its queue when it may send, so its rate changes for what waits, too. Its
price: what finds it idle leaves without its own time on the wire, up to a bucket early.

Standard library alone: the process that follows traces loads this file. linux/pkt_sched.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from testbed.errors import NetworkError
from testbed.net.netlink import (
    RTM_NEWQDISC,
    TCA_KIND,
    TCA_OPTIONS,
    Netlink,
    TrafficObject,
    attribute,
    attributes,
    nested,
    text,
)

ROOT = 0xFFFFFFFF
OUTER, NETEM, BUCKET, PLUG, CODEL, BFIFO, PFIFO, CLOSED = (number << 16 for number in range(1, 9))  # handles
ETHERNET_HEADER = 14
SLACK_S = 1e-3
"""Beside a full-sized packet the bucket holds what the rate gives in this time: a timer's lateness must not cost rate."""
HOLD, RELEASE = 0, 2  # TCQ_PLUG_BUFFER, TCQ_PLUG_RELEASE_INDEFINITE
_PLUG_LIMIT = 3
_STAB = 8
_TBF_PARAMETERS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_RATE_SPEC = struct.Struct(
    "=BBHhHI"
)  # struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate
_TBF = struct.Struct("=III")  # the rest of struct tc_tbf_qopt, behind two rates: limit, buffer, mtu
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET: no tables
_FULL32 = 0xFFFFFFFF
_NS_PER_TICK = 64


class Encodable(Protocol):
    """A qdisc's options."""

    def encode(self) -> bytes: ...
    def differences(self, kernel: bytes) -> list[str]: ...


@dataclass(frozen=True)
class Qdisc:
    """One queueing discipline: where it is, its kind, its options."""

    handle: int
    parent: int
    kind: str
    options: Encodable


def size_offset(overhead: int) -> bytes:
    """TCA_STAB: packets count as *overhead* bytes longer than their frames, in all of the qdiscs below, too (tc-stab(8)).

    The kernel takes it for a root qdisc only.
    """
    # struct tc_sizespec: cell_log, size_log, cell_align, overhead, linklayer, mpu, mtu, tsize
    return nested(_STAB, attribute(1, struct.pack("=BBhiIIII", 0, 0, 0, overhead, _ETHERNET, 0, 0, 0)))


@dataclass(frozen=True)
class TokenBucket:
    """A rate, and what may leave at once after a pause. The queue is the qdisc inside."""

    rate_bytes_per_s: int
    burst_bytes: int

    def encode(self) -> bytes:
        rate = _RATE_SPEC.pack(0, _ETHERNET, 0, 0, 0, min(self.rate_bytes_per_s, _FULL32))
        return b"".join(
            [
                attribute(_TBF_PARAMETERS, rate + bytes(_RATE_SPEC.size) + _TBF.pack(0, 0, 0)),
                attribute(_TBF_RATE64, struct.pack("=Q", self.rate_bytes_per_s)),
                attribute(_TBF_BURST, struct.pack("=I", self.burst_bytes)),
            ]
        )

    def differences(self, kernel: bytes) -> list[str]:
        """See `options.Options.differences`. The kernel says the bucket as a time, to 64 ns."""
        attrs = attributes(kernel)
        parameters = attrs.get(_TBF_PARAMETERS, bytes(2 * _RATE_SPEC.size + _TBF.size))
        rate = _RATE_SPEC.unpack_from(parameters)[5]
        if _TBF_RATE64 in attrs:
            rate = struct.unpack("=Q", attrs[_TBF_RATE64])[0]
        ticks = _TBF.unpack_from(parameters, 2 * _RATE_SPEC.size)[1]
        asked_ticks = self.burst_bytes * 1e9 / self.rate_bytes_per_s / _NS_PER_TICK
        different = []
        if rate != self.rate_bytes_per_s:
            different.append(f"rate: asked {self.rate_bytes_per_s}, has {rate}")
        elif abs(ticks - min(asked_ticks, _FULL32)) > 2 + 1e-6 * asked_ticks:
            different.append(f"burst: asked {asked_ticks:.0f} ticks, has {ticks}")
        return different


def bucket(rate_bps: float, mtu: int) -> TokenBucket:
    """The token bucket for a rate, whose bucket holds a full-sized packet of *mtu* bytes and a little more."""
    rate = max(1, round(rate_bps / 8))
    return TokenBucket(rate, mtu + ETHERNET_HEADER + round(rate * SLACK_S))


@dataclass(frozen=True)
class Fifo:
    """Drop-tail, tc-bfifo(8) in bytes or tc-pfifo(8) in packets."""

    limit: int

    def encode(self) -> bytes:
        """TCA_OPTIONS: struct tc_fifo_qopt."""
        return struct.pack("=I", self.limit)

    def differences(self, kernel: bytes) -> list[str]:
        has = struct.unpack_from("=I", kernel)[0]
        return [] if has == self.limit else [f"limit: asked {self.limit}, has {has}"]


@dataclass(frozen=True)
class Plug:
    """A drop-tail queue that can be held, tc's ``plug`` (linux/net/sched/sch_plug.c). Its frames count with their headers.

    Held from its beginning. Releasing it makes the kernel look at the whole device's queue at once, which a change of rate does
    not: the bucket would sleep until it could have sent at its old one. It says nothing about itself.
    """

    limit_bytes: int
    action: int = _PLUG_LIMIT

    def encode(self) -> bytes:
        """TCA_OPTIONS: struct tc_plug_qopt."""
        return struct.pack("=iI", self.action, self.limit_bytes)

    def differences(self, kernel: bytes) -> list[str]:
        """None: the kernel does not tell."""
        return []


@dataclass(frozen=True)
class CoDelQueue:
    """tc-codel(8): controlled delay, with a limit in packets."""

    target_us: int
    interval_us: int
    limit_packets: int
    ecn: bool

    def encode(self) -> bytes:
        values = (self.target_us, self.limit_packets, self.interval_us, int(self.ecn))  # TCA_CODEL_*, from 1
        return b"".join(attribute(i, struct.pack("=I", value)) for i, value in enumerate(values, 1))

    def differences(self, kernel: bytes) -> list[str]:
        """See `options.Options.differences`. The kernel keeps times in units of 1024 ns."""
        values = {kind: struct.unpack("=I", value)[0] for kind, value in attributes(kernel).items()}
        different = []
        for kind, name, asked, off in (
            (1, "target", self.target_us, 2),
            (3, "interval", self.interval_us, 2),
            (2, "limit", self.limit_packets, 0),
            (4, "ecn", int(self.ecn), 0),
        ):
            if abs(values.get(kind, -1) - asked) > off:
                different.append(f"{name}: asked {asked}, has {values.get(kind)}")
        return different


def put(netlink: Netlink, ifindex: int, qdisc: Qdisc, flags: int, stab: bytes = b"") -> None:
    """Asks for a qdisc. *flags*: whether it is made, replaced or changed (rtnetlink(7)); *stab*: its size table, encoded.
    Raises NetworkError where the kernel refuses."""
    attrs = (text(TCA_KIND, qdisc.kind), attribute(TCA_OPTIONS, qdisc.options.encode()), stab)
    where = (ifindex, qdisc.handle, qdisc.parent)
    netlink.traffic(RTM_NEWQDISC, flags, *where, 0, *attrs, what=f"tc {qdisc.kind}")


def find(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject | None:
    """The qdisc with that handle; None where there is none, or what is outermost is no netem."""
    qdisc = netlink.qdisc(ifindex, handle)
    return qdisc if qdisc is not None and (handle != OUTER or qdisc.kind == "netem") else None


def get(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject:
    """The same. Raises NetworkError where there is none."""
    qdisc = find(netlink, ifindex, handle)
    if qdisc is None:
        raise NetworkError(f"interface {ifindex}: its qdisc {handle >> 16}: is gone")
    return qdisc
