"""The kernel's emulator, tc-netem(8): two of them on each side of the wire.

    l0a ──redirect──▶ l0b egress: netem 1: (loss, delay, jitter)  ▶  netem 2: (rate, queue)        and the other way after *down*

Why two: a single netem's ``limit`` counts what waits *and* what is on its way, in packets of any size, so its queue would
depend on how full the pipe is, and small packets (acknowledgements) would overflow it where nothing waits. The inner one
sees packets only when they have arrived at the bottleneck. Its queue is counted in packets, not bytes: full-sized ones.

Order: with a rate, netem never lets a packet leave before the one in front of it; without one, jitter reorders. Where there
is jitter, the outer netem is therefore given a rate so high that sending takes no time.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from testbed.errors import NetworkError, UsageError
from testbed.net.emulators.contract import Attachment, Counters
from testbed.net.emulators.redirect import counted, end_redirect, quieten, redirect, redirected
from testbed.net.emulators.refusal import refuse_unknown
from testbed.net.emulators.rtnetlink import (
    CREATE,
    EXCLUSIVE,
    RTM_DELQDISC,
    RTM_NEWQDISC,
    TCA_KIND,
    TCA_OPTIONS,
    Netlink,
    RefusedError,
    TrafficObject,
    attribute,
    attributes,
    text,
)

if TYPE_CHECKING:
    from testbed.net.profile import Profile

HONOURED = frozenset({"mtu"})
"""What of `Direction.beyond_the_basics` this emulator knows."""

_ROOT = 0xFFFFFFFF
_OUTER, _INNER, _OUTER_CLASS = 0x10000, 0x20000, 0x10001  # handles 1: and 2:, and class 1:1
_ETHERNET_HEADER = 14
_GENEROUS = 1_000_000  # packets: no limit
_NO_TIME_BPS = 8e12  # a full-sized packet takes 1.5 ns
_NS_PER_TICK = 64  # of the legacy fields, PSCHED_SHIFT = 6
_FULL = 0xFFFFFFFF  # a probability of 1

# enum TCA_NETEM_* of linux/pkt_sched.h
_CORR, _DELAY_DIST, _REORDER, _CORRUPT, _RATE, _RATE64, _LATENCY64, _JITTER64, _PRNG_SEED = (
    1,
    2,
    3,
    4,
    6,
    8,
    10,
    11,
    14,
)
_QOPT = struct.Struct("=IIIIII")  # struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter
_RATE_STRUCT = struct.Struct("=IiIi")  # struct tc_netem_rate: rate, packet_overhead, cell_size, cell_overhead
_DISTRIBUTION_SIZE, _DISTRIBUTION_SCALE = 4096, 8192


@dataclass(frozen=True)
class Options:
    """What one netem is told. `encode` gives TCA_OPTIONS in full, so that nothing of an earlier setting survives a change."""

    limit_packets: int = _GENEROUS
    delay_ns: int = 0
    jitter_ns: int = 0
    loss: int = 0  # of 2³²-1
    rate_bytes_per_s: int = 0  # 0: no limit
    packet_overhead: int = 0
    seed: int | None = None

    def encode(self) -> bytes:
        """TCA_OPTIONS: struct tc_netem_qopt, followed by attributes."""
        ticks = [min(ns // _NS_PER_TICK, _FULL) for ns in (self.delay_ns, self.jitter_ns)]
        parts = [
            _QOPT.pack(ticks[0], self.limit_packets, self.loss, 0, 0, ticks[1]),
            attribute(_CORR, bytes(12)),
            attribute(_REORDER, bytes(8)),
            attribute(_CORRUPT, bytes(8)),
            attribute(
                _RATE, _RATE_STRUCT.pack(min(self.rate_bytes_per_s, _FULL), self.packet_overhead, 0, 0)
            ),
            attribute(_RATE64, struct.pack("=Q", self.rate_bytes_per_s)),
            attribute(_LATENCY64, struct.pack("=q", self.delay_ns)),
            attribute(_JITTER64, struct.pack("=q", self.jitter_ns)),
        ]
        if self.jitter_ns:
            parts.append(attribute(_DELAY_DIST, normal_distribution()))
        if self.seed is not None:
            parts.append(attribute(_PRNG_SEED, struct.pack("=Q", self.seed)))
        return b"".join(parts)

    def differences(self, kernel: bytes) -> list[str]:
        """The fields in which the kernel's TCA_OPTIONS say something else, as ``"delay: asked …, has …"``."""
        ticks, limit, loss, gap, duplicate, jitter_ticks = _QOPT.unpack_from(kernel)
        found = attributes(kernel[_QOPT.size :])
        rate, overhead = _RATE_STRUCT.unpack(found[_RATE])[:2] if _RATE in found else (0, 0)
        has = {
            "limit": limit,
            "loss": loss,
            "gap": gap,
            "duplicate": duplicate,
            "delay": _number("=q", found.get(_LATENCY64), ticks * _NS_PER_TICK),
            "jitter": _number("=q", found.get(_JITTER64), jitter_ticks * _NS_PER_TICK),
            "rate": _number("=Q", found.get(_RATE64), rate),
            "packet overhead": overhead,
            "loss model": 5 in found and attributes(found[5]) != {},
            "corruption": any(found.get(_CORRUPT, b"")[:4]),
            "reordering": any(found.get(_REORDER, b"")[:4]),
        }
        asked = {
            "limit": self.limit_packets,
            "loss": self.loss,
            "gap": 0,
            "duplicate": 0,
            "delay": self.delay_ns,
            "jitter": self.jitter_ns,
            "rate": self.rate_bytes_per_s,
            "packet overhead": self.packet_overhead,
            "loss model": False,
            "corruption": False,
            "reordering": False,
        }
        if self.seed is not None and _PRNG_SEED in found:  # kernels before 6.6 know no seed
            asked["seed"], has["seed"] = self.seed, _number("=Q", found[_PRNG_SEED], 0)
        return [f"{name}: asked {asked[name]}, has {has[name]}" for name in asked if asked[name] != has[name]]


def options(
    profile: Profile, way: Literal["up", "down"], mtu: int, seed: int | None = None
) -> tuple[Options, Options]:
    """The outer and the inner netem of one direction. *mtu*: bytes of the network layer in a full-sized packet."""
    direction = profile.up if way == "up" else profile.down
    waiting = direction.queue_bytes(profile.round_trip_s)
    outer = Options(
        delay_ns=round(direction.delay_s * 1e9),
        jitter_ns=round(direction.jitter_s * 1e9),
        loss=round(direction.loss * _FULL),
        rate_bytes_per_s=round(_NO_TIME_BPS / 8) if direction.jitter_s else 0,
        seed=seed,
    )
    inner = Options(
        # One more: the packet that is being sent is in the queue, too.
        limit_packets=_GENEROUS if waiting is None else -(-waiting // mtu) + 1,
        rate_bytes_per_s=max(1, round(direction.rate_bps / 8)) if direction.rate_bps else 0,
        packet_overhead=-_ETHERNET_HEADER if direction.rate_bps else 0,
    )
    return outer, inner


def normal_distribution() -> bytes:
    """The table netem draws deviations from, in units of the jitter: the normal distribution's quantiles."""
    normal = NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / _DISTRIBUTION_SIZE) for i in range(_DISTRIBUTION_SIZE)]
    values = [max(-32768, min(32767, round(q * _DISTRIBUTION_SCALE))) for q in quantiles]
    return struct.pack(f"={_DISTRIBUTION_SIZE}h", *values)


def available() -> bool:
    """Whether this kernel has netem, found out by asking for one in a scratch namespace. Raises UsageError without root."""
    with Netlink(None) as netlink:
        loopback = netlink.interface("lo").index
        try:
            _set(netlink, loopback, _OUTER, _ROOT, Options(), CREATE | EXCLUSIVE)
        except RefusedError as refusal:
            if refusal.number == errno.ENOENT:
                return False
            raise
        return True


def require() -> None:
    """Raises UsageError when this kernel has no netem."""
    if not available():
        raise UsageError(
            "emulator netem: this kernel has no sch_netem (try modprobe sch_netem); use --emulator userspace or auto"
        )


class Netem:
    """The emulator called ``netem``; see `testbed.net.emulators`."""

    name = "netem"

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises NetworkError when the kernel refuses, or has set something else than was asked."""
        refuse_unknown(self.name, profile, HONOURED)
        quieten(wire)
        attachment = NetemAttachment(wire, link, a, b, self._seed)
        try:
            attachment.create(profile)
        except BaseException:
            attachment.detach()
            raise
        return attachment

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Nothing to do: the wire, which is about to be removed, takes its qdiscs along."""

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """See `Emulator.reattach`."""
        with Netlink(wire) as netlink:
            for interface in (a, b):
                if not _find(netlink, netlink.interface(interface).index, _OUTER):
                    raise NetworkError(f"link {link}: {interface} has no netem (any more)")
        return NetemAttachment(wire, link, a, b, self._seed)


class NetemAttachment:
    """One link between two interfaces with netem on each."""

    process: tuple[int, int] | None = None

    def __init__(self, wire: str, link: str, a: str, b: str, seed: int | None) -> None:
        self._wire, self._link, self._seed = wire, link, seed
        self._ends: dict[Literal["up", "down"], tuple[str, str]] = {"up": (a, b), "down": (b, a)}  # from, to

    def create(self, profile: Profile) -> None:
        """Puts the queueing disciplines and redirects in place."""
        self._configure(profile, CREATE | EXCLUSIVE)
        with Netlink(self._wire) as netlink:
            for source, target in self._ends.values():
                redirect(netlink, netlink.interface(source).index, netlink.interface(target).index)

    def apply(self, profile: Profile, origin_s: float | None = None) -> None:
        refuse_unknown(Netem.name, profile, HONOURED)
        self._configure(profile, 0)

    def _configure(self, profile: Profile, flags: int) -> None:
        with Netlink(self._wire) as netlink:
            for number, (way, (_, name)) in enumerate(self._ends.items()):
                target = netlink.interface(name)
                seed = None if self._seed is None else 2 * self._seed + number
                outer, inner = options(profile, way, target.mtu, seed)
                _set(netlink, target.index, _OUTER, _ROOT, outer, flags)
                _set(netlink, target.index, _INNER, _OUTER_CLASS, inner, flags)
                for asked, handle in ((outer, _OUTER), (inner, _INNER)):
                    if wrong := asked.differences(_get(netlink, target.index, handle).options):
                        raise NetworkError(
                            f"link {self._link} {way}: the kernel's netem differs: {'; '.join(wrong)}"
                        )

    def counters(self) -> dict[str, Counters]:
        counters = {}
        with Netlink(self._wire) as netlink:
            for way, (source, name) in self._ends.items():
                target = netlink.interface(name).index
                delivered, _ = counted(_get(netlink, target, _INNER).stats)
                queue = _drops(_get(netlink, target, _INNER))
                # The outer one counts as its own what the inner one dropped.
                loss = max(0, _drops(_get(netlink, target, _OUTER)) - queue)
                packets, total = redirected(netlink, netlink.interface(source).index)
                counters[str(way)] = Counters(packets, total, loss, queue, 0.0, delivered=delivered)
        return counters

    def super_packets(self, profile: Profile) -> dict[str, int]:
        """See `Attachment.super_packets`: netem counts, loses and delays what the kernel hands it as one packet."""
        return {"up": 1, "down": 1}

    def detach(self) -> None:
        with contextlib.suppress(NetworkError), Netlink(self._wire) as netlink:
            for source, name in self._ends.values():
                with contextlib.suppress(NetworkError):
                    end_redirect(netlink, netlink.interface(source).index)
                with contextlib.suppress(NetworkError):
                    target = netlink.interface(name).index
                    netlink.traffic(RTM_DELQDISC, 0, target, _OUTER, _ROOT, 0, what=f"tc qdisc del {name}")


def _set(netlink: Netlink, ifindex: int, handle: int, parent: int, asked: Options, flags: int) -> None:
    kind, encoded = text(TCA_KIND, "netem"), attribute(TCA_OPTIONS, asked.encode())
    netlink.traffic(RTM_NEWQDISC, flags, ifindex, handle, parent, 0, kind, encoded, what="tc netem")


def _find(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject | None:
    found = netlink.qdisc(ifindex, handle)
    return found if found is not None and found.kind == "netem" else None


def _get(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject:
    found = _find(netlink, ifindex, handle)
    if found is None:
        raise NetworkError(f"interface {ifindex}: its netem {handle >> 16}: is gone")
    return found


def _drops(qdisc: TrafficObject) -> int:
    return struct.unpack_from("=IIIII", qdisc.stats.get(3, bytes(20)))[2]  # struct gnet_stats_queue


def _number(layout: str, data: bytes | None, default: int) -> int:
    return default if data is None else struct.unpack(layout, data)[0]
