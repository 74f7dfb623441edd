"""The kernel's emulator, tc-netem(8): two of them on each side of the wire.

    l0a ──redirect──▶ l0b egress: netem 1: (loss, corruption, delay, jitter)  ▶  netem 2: (rate, queue)

and the other way after *down*.

Why two: a single netem's ``limit`` counts what waits *and* what is on its way, in packets of any size, so its queue would
depend on how full the pipe is, and small packets (acknowledgements) would overflow it where nothing waits. The inner one
sees packets only when they have arrived at the bottleneck. Its queue is counted in packets, not bytes: full-sized ones.

Order: with a rate, netem never lets a packet leave before the one in front of it; without one, jitter reorders. Where there
is jitter, the outer netem is therefore given a rate so high that sending takes no time, unless it may reorder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from testbed.errors import NetworkError, UsageError
from testbed.net.conditions import MTU
from testbed.net.emulators.contract import Attachment, Counters
from testbed.net.emulators.netem_options import ECN, PRNG_SEED, QOPT, Options
from testbed.net.emulators.netem_plan import (
    BOTTLENECKS,
    BUCKET,
    CODEL,
    OUTER,
    PLUG,
    ROOT,
    Encodable,
    Part,
    Plan,
    gives_rate,
    plan,
)
from testbed.net.emulators.redirect import counted, end_redirect, quieten, redirect, redirected
from testbed.net.emulators.refusal import refuse_unknown
from testbed.net.emulators.rtnetlink import (
    CREATE,
    EXCLUSIVE,
    REPLACE,
    RTM_DELQDISC,
    RTM_NEWQDISC,
    TCA_KIND,
    TCA_OPTIONS,
    Interface,
    Netlink,
    RefusedError,
    TrafficObject,
    attribute,
    attributes,
    text,
)
from testbed.net.emulators.serving import Connection, recorded, start
from testbed.net.emulators.shaping import RELEASE, CoDelQueue, Plug, TokenBucket

if TYPE_CHECKING:
    from testbed.net.conditions import Direction, Profile

HONOURED = frozenset(
    {
        "jitter law",
        "jitter reorder",
        "loss model",
        "corrupt",
        "duplicate",
        "reorder",
        "ecn",
        "overhead",
        "mtu",
    }
    | {"codel", "trace"}
)
"""What of `Direction.beyond_the_basics` this emulator knows; where the kernel knows of seeds, those as well."""

_FOLLOWER = "trace's follower"
_STATS_OWN = 4  # TCA_STATS_APP
_WAYS: tuple[Literal["up"], Literal["down"]] = ("up", "down")
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from testbed.net.emulators.following import main; main()"


def available() -> bool:
    """Whether this kernel has netem, found out by asking for one in a scratch namespace. Raises UsageError without root."""
    return _has("netem")


@functools.cache
def _has(kind: str) -> bool:
    """Whether this kernel has such a qdisc. Raises UsageError without root."""
    with Netlink(None) as netlink:
        try:
            part = Part(OUTER, ROOT, kind, _SAMPLES[kind])
            _set(netlink, netlink.interface("lo").index, part, CREATE | EXCLUSIVE)
        except RefusedError as refusal:
            if refusal.number == errno.ENOENT:
                return False
            raise
        return True


_SAMPLES: dict[str, Encodable] = {
    "netem": Options(),
    "tbf": TokenBucket(1_000_000, 100_000),
    "plug": Plug(100_000),
    "codel": CoDelQueue(5000, 100_000, 1000, False),
}
"""What may be missing: a kernel has the simple queues anyhow."""


def refuse(profile: Profile) -> None:
    """Raises UsageError that names what netem, or this kernel's, cannot honour of *profile*."""
    ways = {"up": profile.up, "down": profile.down}
    seeded = any(direction.seed is not None for direction in ways.values())
    honoured = HONOURED | {"seed"} if seeded and _knows_seeds() else HONOURED
    refuse_unknown(Netem.name, profile, honoured, "use --emulator userspace")
    for way in _WAYS:
        if beside := _conflict(ways[way], way):
            raise UsageError(
                f"emulator netem cannot honour {beside[0]} beside {beside[1]} ({way}); use --emulator userspace"
            )
        for part in plan(profile, way, MTU, None, ways[way].schedule(way, 0.0), 0.0).inner:
            if part.kind in _SAMPLES and part.kind != "netem" and not _has(part.kind):
                raise UsageError(
                    f"emulator netem: for {profile} ({way}) this kernel has no sch_{part.kind} "
                    f"(try modprobe sch_{part.kind}); use --emulator userspace"
                )


def _conflict(direction: Direction, way: Literal["up", "down"]) -> tuple[str, str] | None:
    """Two things that netem can honour one at a time, as they are written."""
    written = direction.beyond_the_basics()
    schedule = direction.schedule(way, 0.0)
    limited = direction.rate_bps is not None or gives_rate(schedule)
    if direction.reorder and limited:
        # A packet that skips the delay skips whatever is inside of that netem: the rate and its queue.
        return repr(written["reorder"]), "a rate"
    if direction.queue.codel is not None and gives_rate(schedule):
        return repr(written["codel"]), f"'{direction.trace}'"
    if schedule is not None and (schedule.delays is not None or schedule.losses is not None):
        # With every change, netem begins its chain and its random numbers anew.
        for name in ("loss model", "seed"):
            if name in written:
                return repr(written[name]), f"'{direction.trace}'"
    return None


def _knows_seeds() -> bool:
    """Whether this kernel's netem says back the seed it was given: those before 6.6 ignore it."""
    with Netlink(None) as netlink:
        loopback = netlink.interface("lo").index
        _set(netlink, loopback, Part(OUTER, ROOT, "netem", Options(seed=1)), CREATE | EXCLUSIVE)
        return PRNG_SEED in attributes(_get(netlink, loopback, OUTER).options[QOPT.size :])


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
        refuse(profile)
        quieten(wire)
        attachment = NetemAttachment(wire, link, a, b, self._seed, keep)
        try:
            attachment.create(profile)
        except BaseException:
            attachment.detach()
            raise
        return attachment

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Ends what follows traces; the wire, which is about to be removed, takes its qdiscs along."""
        for attachment in attachments:
            if isinstance(attachment, NetemAttachment):
                attachment.follow_no_more()

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """See `Emulator.reattach`."""
        with Netlink(wire) as netlink:
            for interface in (a, b):
                if _find(netlink, netlink.interface(interface).index, OUTER) is None:
                    raise NetworkError(f"link {link}: {interface} has no netem (any more)")
        return NetemAttachment(wire, link, a, b, self._seed, keep)


class NetemAttachment:
    """One link between two interfaces with netem on each."""

    def __init__(self, wire: str, link: str, a: str, b: str, seed: int | None, keep: Path | None) -> None:
        self._wire, self._link, self._seed, self._keep = wire, link, seed, keep
        self._ends: dict[Literal["up", "down"], tuple[str, str]] = {"up": (a, b), "down": (b, a)}  # from, to
        self._gone = {"up": (0, 0, 0), "down": (0, 0, 0)}  # see `_Dropped`; of bottlenecks that were replaced
        self._follower: Connection | None = None
        self.process: tuple[int, int] | None = None  # what follows traces; there is none before the first
        if keep is not None and (keep / f"{link}.json").exists():
            first, process, links = recorded(link, keep)
            self._follower, self.process = (
                Connection(first, process, None, keep, set(links), _FOLLOWER),
                process,
            )

    def create(self, profile: Profile) -> None:
        """Puts the queueing disciplines and redirects in place."""
        self._configure(profile, time.monotonic(), created=True)
        with Netlink(self._wire) as netlink:
            for source, target in self._ends.values():
                redirect(netlink, netlink.interface(source).index, netlink.interface(target).index)

    def apply(self, profile: Profile, origin_s: float | None = None) -> None:
        """See `Attachment.apply`. What waits is lost where a bottleneck of another kind takes its place (`netem_plan`)."""
        refuse(profile)
        self._configure(profile, time.monotonic() if origin_s is None else origin_s)

    def _configure(self, profile: Profile, origin_s: float, created: bool = False) -> None:
        if self._follower is not None:
            self._follower.ask(self._link, {"do": "apply", "conditions": {}})  # it keeps its hands off
        orders: dict[str, dict[str, Any]] = {}
        with Netlink(self._wire) as netlink, contextlib.ExitStack() as closing:
            files: list[int] = []
            for number, (way, (_, name)) in enumerate(self._ends.items()):
                target = netlink.interface(name)
                direction = profile.up if way == "up" else profile.down
                schedule = direction.schedule(way, origin_s)
                seed = None if self._seed is None else 2 * self._seed + number
                planned = plan(profile, way, target.mtu, seed, schedule, time.monotonic())
                self._put(netlink, way, target.index, planned, created)
                if schedule is not None:
                    file = closing.enter_context(open(os.memfd_create("schedule"), "wb"))
                    packed = schedule.pack(file) | {"file": len(files)}
                    file.flush()
                    files.append(file.fileno())
                    orders[way] = _orders(planned, target) | {"schedule": packed}
            if orders:
                self._follow().ask(self._link, {"do": "apply", "conditions": orders}, files)

    def _put(self, netlink: Netlink, way: str, ifindex: int, planned: Plan, created: bool) -> None:
        """The qdiscs of one way, in place of what is there. Raises NetworkError where the kernel then has something else."""
        # A netem that duplicates, and any netem inside of it, exclude each other: what there is no more goes first.
        first = planned.outer.duplicate and not created
        parts = [*planned.inner, planned.parts[0]] if first else planned.parts
        before = None
        for part in parts:
            flags = CREATE | EXCLUSIVE if created else 0
            if not created and netlink.qdisc(ifindex, part.handle) is None:
                flags = CREATE | REPLACE
                before = before or _found(netlink, ifindex)
            _set(netlink, ifindex, part, flags, planned.stab if part.handle == OUTER else b"")
        if before is not None:
            waited = _queue(_get(netlink, ifindex, OUTER))[2] - _queue(before[0])[2]
            self._gone[way] = _sum(self._gone[way], _dropped(*before[1:]), (waited, 0, 0))
        for part in parts:
            if wrong := part.told.differences(_get(netlink, ifindex, part.handle).options):
                raise NetworkError(
                    f"link {self._link} {way}: the kernel's {part.kind} differs: {'; '.join(wrong)}"
                )
            if isinstance(part.told, Plug):  # it begins held
                released = replace(part, told=replace(part.told, action=RELEASE))
                _set(netlink, ifindex, released, 0)

    def _follow(self) -> Connection:
        """The connection to what follows this link's traces, which is started where there is none."""
        if self._follower is None:
            process, control = start({self._link: {}}, self._link, self._keep, _PROGRAM, self._wire)
            self._follower = Connection(self._link, process, control, self._keep, {self._link}, _FOLLOWER)
            self.process = process
        return self._follower

    def follow_no_more(self) -> None:
        """Ends what follows the traces."""
        follower, self._follower, self.process = self._follower, None, None
        if follower is not None:
            follower.end()

    def counters(self) -> dict[str, Counters]:
        counters = {}
        lateness: dict[str, Any] = {}
        if self._follower is not None:
            lateness = self._follower.ask(self._link, {"do": "counters"})
        with Netlink(self._wire) as netlink:
            for way, (source, name) in self._ends.items():
                target = netlink.interface(name).index
                packets, total = redirected(netlink, netlink.interface(source).index)
                outer, inner, codel = _found(netlink, target)
                dropped = _sum(self._gone[way], _dropped(inner, codel))
                counted = _counters(packets, total, outer, dropped)
                counters[str(way)] = replace(counted, **lateness.get(way, {}))
        return counters

    def super_packets(self, profile: Profile) -> dict[str, int]:
        """See `Attachment.super_packets`: netem counts, loses and delays what the kernel hands it as one packet."""
        return {"up": 1, "down": 1}

    def detach(self) -> None:
        self.follow_no_more()
        with contextlib.suppress(NetworkError), Netlink(self._wire) as netlink:
            for source, name in self._ends.values():
                with contextlib.suppress(NetworkError):
                    end_redirect(netlink, netlink.interface(source).index)
                with contextlib.suppress(NetworkError):
                    target = netlink.interface(name).index
                    netlink.traffic(RTM_DELQDISC, 0, target, OUTER, ROOT, 0, what=f"tc qdisc del {name}")


def _orders(planned: Plan, target: Interface) -> dict[str, Any]:
    """What the following process has to know of one way, beside the schedule (`following.Way`)."""
    plugs = [part.told.limit_bytes for part in planned.inner if isinstance(part.told, Plug)]
    return {
        "ifindex": target.index,
        "mtu": target.mtu,
        "plug_bytes": plugs[0] if plugs else 0,
        "handles": (OUTER, BUCKET, PLUG, ROOT),
        "outer": planned.outer.encode().hex(),
        "stab": planned.stab.hex(),
    }


def _set(netlink: Netlink, ifindex: int, part: Part, flags: int, stab: bytes = b"") -> None:
    told = (text(TCA_KIND, part.kind), attribute(TCA_OPTIONS, part.told.encode()), stab)
    netlink.traffic(RTM_NEWQDISC, flags, ifindex, part.handle, part.parent, 0, *told, what=f"tc {part.kind}")


def _find(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject | None:
    found = netlink.qdisc(ifindex, handle)
    return found if found is not None and (handle != OUTER or found.kind == "netem") else None


def _get(netlink: Netlink, ifindex: int, handle: int) -> TrafficObject:
    found = _find(netlink, ifindex, handle)
    if found is None:
        raise NetworkError(f"interface {ifindex}: its qdisc {handle >> 16}: is gone")
    return found


def _found(netlink: Netlink, ifindex: int) -> tuple[TrafficObject, TrafficObject, TrafficObject | None]:
    """The outer netem, the bottleneck, and the CoDel queue where there is one."""
    for handle in BOTTLENECKS:
        if (inner := _find(netlink, ifindex, handle)) is not None:
            codel = _find(netlink, ifindex, CODEL) if handle == BUCKET else None
            return _get(netlink, ifindex, OUTER), inner, codel
    raise NetworkError(f"interface {ifindex}: what limits its rate is gone")


_Dropped = tuple[int, int, int]
"""Packets that a bottleneck has dropped in all; of these, by CoDel's law; and packets that CoDel has marked."""


def _dropped(bottleneck: TrafficObject, codel: TrafficObject | None) -> _Dropped:
    total = _queue(bottleneck)[2]
    if codel is None:
        return total, 0, 0
    # struct tc_codel_xstats: the sixth is what its limit dropped, the seventh what it marked.
    values = struct.unpack_from("=IIIIiIIII", codel.stats.get(_STATS_OWN, bytes(36)))
    return total, _queue(codel)[2] - values[5], values[6]


def _sum(*several: _Dropped) -> _Dropped:
    first, second, third = (sum(values) for values in zip(*several, strict=True))
    return first, second, third


def _counters(packets: int, total: int, outer: TrafficObject, bottleneck: _Dropped) -> Counters:
    """*packets*, *total*: that entered, and their bytes."""
    waiting, _, dropped, skipped = _queue(outer)
    delivered, _ = counted(outer.stats)  # packets that skip the delay skip the inner one, too
    queue, aqm, marked = bottleneck
    lost = max(0, dropped - queue)  # the outer one counts as its own what the inner one dropped,
    copies = QOPT.unpack_from(outer.options)[4] > 0
    if any(
        attributes(outer.options[QOPT.size :]).get(ECN, b"")
    ):  # and what it marks: then, lost is what is missing
        seen = lost
        lost = min(lost, max(0, packets - delivered - waiting - queue))
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
        duplicated=max(0, delivered + waiting + queue + lost - packets) if copies else 0,
        reordered=skipped,
    )


def _queue(qdisc: TrafficObject) -> tuple[int, int, int, int]:
    """struct gnet_stats_queue: packets and bytes that wait, drops, and requeues, which are netem's reordered packets."""
    qlen, backlog, drops, requeues = struct.unpack_from("=IIII", qdisc.stats.get(3, bytes(20)))
    return qlen, backlog, drops, requeues
