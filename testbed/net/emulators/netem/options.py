"""What the queueing disciplines of a direction are told: the outer netem, and the bottleneck inside of it. tc-netem(8).

1: netem  delay, jitter, loss, duplication, corruption, reordering
└ 2: netem  rate, queue                                            where that can do it: it is the most exact
└ 3: tbf  rate                                                     else
  └ 4: plug | 5: codel | 6: bfifo  queue                           of a trace's rate | CoDel | otherwise
└ 7: pfifo                                                         nothing to limit, and no netem allowed

Netem's options are sent in full and read back (linux/pkt_sched.h); those of the others are in `qdiscs`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from testbed.net.emulators.netem import qdiscs
from testbed.net.emulators.netem.qdiscs import BFIFO, BUCKET, CODEL, NETEM, OUTER, PFIFO, PLUG, ROOT, Qdisc
from testbed.net.netlink import attribute, attributes, nested
from testbed.net.profile.jitter import JitterTable, table
from testbed.net.profile.loss import GilbertElliott, LossModel

if TYPE_CHECKING:
    from testbed.net.profile.deliveries import Deliveries
    from testbed.net.profile.profile import Profile
    from testbed.net.profile.schedule import Schedule
    from testbed.net.profile.trace import Way


_GENEROUS = 1_000_000  # packets: no limit
_NO_TIME_BPS = 8e12  # a full-sized packet takes 1.5 ns
_NS_PER_TICK = 64  # of the legacy fields, PSCHED_SHIFT = 6
_FULL = 0xFFFFFFFF  # a probability of 1

# enum TCA_NETEM_* of linux/pkt_sched.h
_CORR, _DELAY_DIST, _REORDER, _CORRUPT, _LOSS, _RATE, ECN, _RATE64 = 1, 2, 3, 4, 5, 6, 7, 8
_LATENCY64, _JITTER64, PRNG_SEED = 10, 11, 14
_GI, _GE = 1, 2  # NETEM_LOSS_*, inside of TCA_NETEM_LOSS
QOPT = struct.Struct("=IIIIII")  # struct tc_netem_qopt: latency, limit, loss, gap, duplicate, jitter
_RATE_STRUCT = struct.Struct("=IiIi")  # struct tc_netem_rate: rate, packet_overhead, cell_size, cell_overhead
_PAIR = struct.Struct("=II")  # struct tc_netem_reorder, tc_netem_corrupt: probability, correlation


@dataclass(frozen=True)
class Options:
    """One netem's. `encode` gives TCA_OPTIONS in full, so that nothing of an earlier setting survives a change.

    Probabilities are of 2³²-1.
    """

    limit_packets: int = _GENEROUS
    delay_ns: int = 0
    jitter_ns: int = 0
    jitter_law: str | JitterTable = "normal"
    loss: int = 0
    loss_model: bytes = b""  # the attribute inside of TCA_NETEM_LOSS; `loss` is then not looked at
    duplicate: int = 0
    corrupt: int = 0
    reorder: int = 0
    ecn: bool = False
    rate_bytes_per_s: int = 0  # 0: no limit
    packet_overhead: int = 0
    seed: int | None = None

    def encode(self) -> bytes:
        """TCA_OPTIONS: struct tc_netem_qopt, followed by attributes."""
        gap = 1 if self.reorder else 0  # 1: the dice are thrown for every packet
        ticks = [min(ns // _NS_PER_TICK, _FULL) for ns in (self.delay_ns, self.jitter_ns)]
        rate = _RATE_STRUCT.pack(min(self.rate_bytes_per_s, _FULL), self.packet_overhead, 0, 0)
        parts = [
            QOPT.pack(ticks[0], self.limit_packets, self.loss, gap, self.duplicate, ticks[1]),
            attribute(_CORR, bytes(12)),
            attribute(_REORDER, _PAIR.pack(self.reorder, 0)),
            attribute(_CORRUPT, _PAIR.pack(self.corrupt, 0)),
            attribute(_RATE, rate),
            attribute(ECN, struct.pack("=I", self.ecn)),
            attribute(_RATE64, struct.pack("=Q", self.rate_bytes_per_s)),
            attribute(_LATENCY64, struct.pack("=q", self.delay_ns)),
            attribute(_JITTER64, struct.pack("=q", self.jitter_ns)),
        ]
        if self.loss_model:  # without it, a change goes back to independent loss
            parts.append(nested(_LOSS, self.loss_model))
        if self.jitter_ns:
            parts.append(attribute(_DELAY_DIST, distribution(self.jitter_law)))
        if self.seed is not None:
            parts.append(attribute(PRNG_SEED, struct.pack("=Q", self.seed)))
        return b"".join(parts)

    def differences(self, kernel: bytes) -> list[str]:
        """The fields in which the kernel's TCA_OPTIONS say something else, as ``"delay: asked …, has …"``.

        The kernel does not tell the table of a jitter's law.
        """
        asked, has = _decoded(self.encode()), _decoded(kernel)
        return [
            f"{name}: asked {asked[name]}, has {has[name]}"
            for name in asked
            if name in has and asked[name] != has[name]
        ]


def _decoded(data: bytes) -> dict[str, object]:
    """What TCA_OPTIONS say; no seed where there is none, as in kernels before 6.6."""
    ticks, limit, loss, gap, duplicate, jitter_ticks = QOPT.unpack_from(data)
    attrs = attributes(data[QOPT.size :])
    rate, overhead = _RATE_STRUCT.unpack(attrs[_RATE])[:2] if _RATE in attrs else (0, 0)
    fields = {
        "limit": limit,
        "loss": loss,
        "gap": gap,
        "duplicate": duplicate,
        "delay": _number("=q", attrs.get(_LATENCY64), ticks * _NS_PER_TICK),
        "jitter": _number("=q", attrs.get(_JITTER64), jitter_ticks * _NS_PER_TICK),
        "rate": _number("=Q", attrs.get(_RATE64), rate),
        "packet overhead": overhead,
        "loss model": _loss_model_text(attrs.get(_LOSS, b"")),
        "corruption": _PAIR.unpack(attrs.get(_CORRUPT, bytes(8))),
        "reordering": _PAIR.unpack(attrs.get(_REORDER, bytes(8))),
        "ecn": bool(_number("=I", attrs.get(ECN), 0)),
    }
    return fields | ({"seed": _number("=Q", attrs[PRNG_SEED], 0)} if PRNG_SEED in attrs else {})


def options(profile: Profile, way: Way, mtu: int, seed: int | None = None) -> tuple[Options, Options]:
    """The outer and the inner netem of one direction. *mtu*: bytes of the network layer in a full-sized packet."""
    direction = profile.ways[way]
    waiting = profile.queue_bytes(way)
    in_order = bool(direction.jitter_s) and not direction.jitter_reorders
    model = direction.loss_model
    outer = Options(
        delay_ns=round(direction.delay_s * 1e9),
        jitter_ns=round(direction.jitter_s * 1e9),
        jitter_law=direction.jitter_law,
        loss=_of_full(direction.loss) if model is None else 0,
        loss_model=b"" if model is None else loss_attribute(model),
        duplicate=_of_full(direction.duplicate),
        corrupt=_of_full(direction.corrupt),
        reorder=_of_full(direction.reorder),
        ecn=direction.ecn,
        seed=seed if direction.seed is None else direction.seed,
    )
    outer = ordered(outer) if in_order else outer
    inner = Options(
        # One more: the packet that is being sent is in the queue, too.
        limit_packets=_GENEROUS if waiting is None else -(-waiting // mtu) + 1,
        rate_bytes_per_s=max(1, round(direction.rate_bps / 8)) if direction.rate_bps else 0,
        packet_overhead=direction.overhead_bytes - qdiscs.ETHERNET_HEADER if direction.rate_bps else 0,
    )
    return outer, inner


def ordered(outer: Options) -> Options:
    """The same where no packet leaves before the one in front of it: with a rate at which sending takes no time."""
    return replace(outer, rate_bytes_per_s=round(_NO_TIME_BPS / 8))


def at_present(outer: Options, delay_s: float | None, loss: float | None) -> Options:
    """The same with another delay and independent loss; None: as it is."""
    if delay_s is not None:
        outer = replace(outer, delay_ns=round(delay_s * 1e9))
    return outer if loss is None else replace(outer, loss=_of_full(loss), loss_model=b"")


def loss_attribute(model: LossModel) -> bytes:
    """A chain as netem has it, NETEM_LOSS_GI or NETEM_LOSS_GE: the same chains as `testbed.net.profile.loss`, step for step."""
    if isinstance(model, GilbertElliott):
        # struct tc_netem_gemodel: p, r, h, 1-k; h is what the bad state lets through.
        h = _FULL - _of_full(model.bad_loss)
        return attribute(
            _GE, struct.pack("=4I", _of_full(model.p), _of_full(model.r), h, _of_full(model.good_loss))
        )
    # The kernel adds two leaving the same state in 32 bits: together they must not exceed them.
    p14, p32 = _of_full(model.p14), _of_full(model.p32)
    p13, p31 = min(_of_full(model.p13), _FULL - p14), min(_of_full(model.p31), _FULL - p32)
    return attribute(_GI, struct.pack("=5I", p13, p31, p32, p14, _of_full(model.p23)))


def distribution(law: str | JitterTable) -> bytes:
    """TCA_NETEM_DELAY_DIST: the table that netem draws deviations from, 8192 standing for one jitter."""
    entries = table(law)
    return struct.pack(f"={len(entries)}h", *entries)


def _loss_model_text(data: bytes) -> str:
    attrs = attributes(data)
    for kind, name, count in ((_GI, "states", 5), (_GE, "gilbert", 4)):
        if kind in attrs:
            return f"{name}{struct.unpack_from(f'={count}I', attrs[kind])}"
    return "none"


def _of_full(probability: float) -> int:
    return round(probability * _FULL)


def _number(layout: str, data: bytes | None, default: int) -> int:
    return default if data is None else struct.unpack(layout, data)[0]


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
    outer, inner = options(profile, way, mtu, seed)
    if schedule is not None:
        delay, loss = schedule.delay_at(now), schedule.loss_at(now)
        if delay is not None or loss is not None:
            outer = ordered(replace(outer, seed=None))
            outer = at_present(outer, delay, loss)
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
