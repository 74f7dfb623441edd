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
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import NetworkError
from testbed.net.emulators.emulator import Attachment, Counters, Emulator, quieten
from testbed.net.emulators.netem import support
from testbed.net.emulators.netem.counters import (
    Dropped,
    dropped_by,
    drops,
    link_counters,
    outer_and_bottleneck,
    waiting,
)
from testbed.net.emulators.netem.options import Hierarchy, hierarchy
from testbed.net.emulators.netem.qdiscs import (
    BUCKET,
    CLOSED,
    OUTER,
    PLUG,
    RELEASE,
    ROOT,
    Fifo,
    Plug,
    Qdisc,
    find,
    get,
    put,
)
from testbed.net.emulators.netem.redirect import INGRESS, INGRESS_PARENT, redirect, redirected
from testbed.net.emulators.relay.serving import ServingProcess
from testbed.net.netlink import CREATE, EXCLUSIVE, REPLACE, RTM_DELQDISC, Interface, Netlink

if TYPE_CHECKING:
    from testbed.net.profile.conditions import Profile
    from testbed.net.profile.trace import Way

_FOLLOWER = "trace's follower"
_NOTHING = Counters(0, 0, 0, 0, 0.0)
_PROGRAM = "testbed.net.emulators.netem.trace_follower"


class Netem(Emulator):
    """The emulator called ``netem``; see `testbed.net.emulators`."""

    name = "netem"
    least_correlation, most_off = 0.98, 0.03  # it is told every few milliseconds

    @classmethod
    def require(cls) -> None:
        support.require()

    @classmethod
    def available(cls) -> bool:
        return support.available()

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises NetworkError when the kernel refuses, or has set something else than was planned."""
        support.refuse(profile)
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
        with Netlink(wire) as netlink:
            for interface in (a, b):
                if find(netlink, netlink.interface(interface).index, OUTER) is None:
                    raise NetworkError(f"link {link}: {interface} has no netem (any more)")
        return NetemAttachment(wire, link, a, b, self._seed, keep)


class NetemAttachment(Attachment):
    """One link between two interfaces with netem on each."""

    def __init__(self, wire: str, link: str, a: str, b: str, seed: int | None, keep: Path | None) -> None:
        self._wire, self._link, self._seed, self._keep = wire, link, seed, keep
        self._ends: dict[Way, tuple[str, str]] = {"up": (a, b), "down": (b, a)}  # from, to
        self._gone = {"up": Dropped(), "down": Dropped()}  # of bottlenecks that were replaced
        self._past = {"up": _NOTHING, "down": _NOTHING}  # of all qdiscs that were
        self._follower: ServingProcess | None = None
        self.process: tuple[int, int] | None = None  # what follows traces; there is none before the first
        if keep is not None and (keep / f"{link}.json").exists():
            self._follower = ServingProcess.recorded(link, keep, _FOLLOWER)
            self.process = self._follower.process

    def create(self, profile: Profile) -> None:
        """Puts the queueing disciplines and redirects in place."""
        self._configure(profile, time.monotonic(), created=True)
        redirect(self._wire, self._ends.values())

    def apply(self, profile: Profile, origin_s: float | None = None, *, fresh: bool = False) -> None:
        """See `Attachment.apply`. What waits is lost where a bottleneck of another kind takes its place (`options.hierarchy`)."""
        support.refuse(profile)
        # A netem that holds nothing keeps no order with what was.
        fresh = fresh and self.under_way() > 0
        self._configure(profile, time.monotonic() if origin_s is None else origin_s, fresh=fresh)

    def under_way(self) -> int:
        with Netlink(self._wire) as netlink:
            ends = [netlink.interface(name).index for _, name in self._ends.values()]
            return sum(waiting(get(netlink, ifindex, OUTER)) for ifindex in ends)

    def _clear(self, netlink: Netlink) -> None:
        """Ends both ways' qdiscs, and all packets in them; what comes until there are new ones is dropped."""
        counted = self._counted(netlink)
        for way, (_, name) in self._ends.items():
            target = netlink.interface(name).index
            held = waiting(get(netlink, target, OUTER))
            put(netlink, target, Qdisc(CLOSED, ROOT, "pfifo", Fifo(0)), CREATE | REPLACE)
            self._past[way] = replace(counted[way], cleared=counted[way].cleared + held)
            self._gone[way] = Dropped()

    def _configure(
        self, profile: Profile, origin_s: float, created: bool = False, fresh: bool = False
    ) -> None:
        if self._follower is not None:
            self._follower.ask(self._link, {"do": "apply", "conditions": {}})  # it keeps its hands off
        orders: dict[str, dict[str, Any]] = {}
        with Netlink(self._wire) as netlink, contextlib.ExitStack() as closing:
            files: list[int] = []
            if fresh:
                self._clear(netlink)
            for number, (way, (_, name)) in enumerate(self._ends.items()):
                target = netlink.interface(name)
                schedule = profile.ways[way].schedule(way, origin_s)
                seed = None if self._seed is None else 2 * self._seed + number
                planned = hierarchy(profile, way, target.mtu, seed, schedule, time.monotonic())
                self._put(netlink, way, target.index, planned, created, fresh)
                if schedule is not None:
                    file = closing.enter_context(open(os.memfd_create("schedule"), "wb"))
                    packed = schedule.pack(file) | {"file": len(files)}
                    file.flush()
                    files.append(file.fileno())
                    orders[way] = _orders(planned, target) | {"schedule": packed}
            if orders:
                self._follow().ask(self._link, {"do": "apply", "conditions": orders}, files)

    def _put(
        self, netlink: Netlink, way: str, ifindex: int, planned: Hierarchy, created: bool, fresh: bool
    ) -> None:
        """The qdiscs of one way, in place of what is there. Raises NetworkError where the kernel then has something else."""
        # A netem that duplicates, and any netem inside of it, exclude each other: what there is no more goes first.
        first = planned.outer.duplicate and not created and not fresh
        qdiscs = [*planned.inner, planned.qdiscs[0]] if first else planned.qdiscs
        before = None
        for qdisc in qdiscs:
            flags = CREATE | EXCLUSIVE if created else CREATE | REPLACE if fresh else 0
            if not flags and netlink.qdisc(ifindex, qdisc.handle) is None:
                flags = CREATE | REPLACE
                before = before or outer_and_bottleneck(netlink, ifindex)
            put(netlink, ifindex, qdisc, flags, planned.stab if qdisc.handle == OUTER else b"")
        if before is not None:
            waited = drops(get(netlink, ifindex, OUTER)) - drops(before[0])
            self._gone[way] = self._gone[way].plus(dropped_by(*before[1:])).plus(Dropped(waited))
        for qdisc in qdiscs:
            if wrong := qdisc.options.differences(get(netlink, ifindex, qdisc.handle).options):
                raise NetworkError(
                    f"link {self._link} {way}: the kernel's {qdisc.kind} differs: {'; '.join(wrong)}"
                )
            if isinstance(qdisc.options, Plug):  # it begins held
                released = replace(qdisc, options=replace(qdisc.options, action=RELEASE))
                put(netlink, ifindex, released, 0)

    def _follow(self) -> ServingProcess:
        """The connection to what follows this link's traces, which is started where there is none."""
        if self._follower is None:
            self._follower = ServingProcess.start(
                {self._link: {}}, self._keep, _PROGRAM, _FOLLOWER, self._wire
            )
            self.process = self._follower.process
        return self._follower

    def follow_no_more(self) -> None:
        """Ends what follows the traces."""
        follower, self._follower, self.process = self._follower, None, None
        if follower is not None:
            follower.end()

    def counters(self) -> dict[str, Counters]:
        lateness: dict[str, Any] = {}
        if self._follower is not None:
            lateness = self._follower.ask(self._link, {"do": "counters"})
        with Netlink(self._wire) as netlink:
            counted = self._counted(netlink)
        return {way: replace(values, **lateness.get(way, {})) for way, values in counted.items()}

    def _counted(self, netlink: Netlink) -> dict[str, Counters]:
        """Without lateness."""
        counters = {}
        for way, (source, name) in self._ends.items():
            target, past = netlink.interface(name).index, self._past[way]
            packets, total = redirected(netlink, netlink.interface(source).index)
            outer, inner, codel = outer_and_bottleneck(netlink, target)
            dropped = self._gone[way].plus(dropped_by(inner, codel))
            counted = link_counters(packets - past.packets, total - past.bytes, outer, dropped)
            counters[str(way)] = past.plus(counted)
        return counters

    def fate(self) -> str | None:
        return self._follower.fate() if self._follower is not None else None

    def detach(self) -> None:
        self.follow_no_more()
        with contextlib.suppress(NetworkError), Netlink(self._wire) as netlink:
            for source, target in self._ends.values():
                for name, handle, parent in ((source, INGRESS, INGRESS_PARENT), (target, OUTER, ROOT)):
                    with contextlib.suppress(NetworkError):
                        index = netlink.interface(name).index
                        netlink.traffic(
                            RTM_DELQDISC, 0, index, handle, parent, 0, what=f"tc qdisc del {name}"
                        )


def _orders(planned: Hierarchy, target: Interface) -> dict[str, Any]:
    """What the following process has to know of one way, beside the schedule (`trace_follower.Way`)."""
    plugs = [qdisc.options.limit_bytes for qdisc in planned.inner if isinstance(qdisc.options, Plug)]
    return {
        "ifindex": target.index,
        "mtu": target.mtu,
        "plug_bytes": plugs[0] if plugs else 0,
        "handles": (OUTER, BUCKET, PLUG, ROOT),
        "outer": planned.outer.encode().hex(),
        "stab": planned.stab.hex(),
    }
