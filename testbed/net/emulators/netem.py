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
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from testbed.errors import NetworkError, UsageError
from testbed.net.emulators.contract import Attachment, Counters
from testbed.net.emulators.netem_options import ECN, PRNG_SEED, QOPT, Options, options
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

HONOURED = frozenset(
    {"jitter law", "jitter reorder", "loss model", "corrupt", "reorder", "ecn", "overhead", "mtu"}
)
"""What of `Direction.beyond_the_basics` this emulator knows; where the kernel knows of seeds, those as well.

Not duplication: kernels since 6.16, and the stable ones since then, refuse it where a netem is inside another.
"""

_ROOT = 0xFFFFFFFF
_OUTER, _INNER, _OUTER_CLASS = 0x10000, 0x20000, 0x10001  # handles 1: and 2:, and class 1:1


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


def refuse(profile: Profile) -> None:
    """Raises UsageError that names what netem, or this kernel's, cannot honour of *profile*."""
    ways = {"up": profile.up, "down": profile.down}
    seeded = any(direction.seed is not None for direction in ways.values())
    honoured = HONOURED | {"seed"} if seeded and _knows_seeds() else HONOURED
    refuse_unknown(Netem.name, profile, honoured, "use --emulator userspace")
    for way, direction in ways.items():
        if direction.reorder and direction.rate_bps is not None:
            # A packet that skips the delay skips whatever is inside of that netem: the rate and its queue.
            raise UsageError(
                f"emulator netem cannot honour 'reorder={direction.reorder:g}' beside a rate ({way}, reorder); "
                "use --emulator userspace"
            )


def _knows_seeds() -> bool:
    """Whether this kernel's netem says back the seed it was given: those before 6.6 ignore it."""
    with Netlink(None) as netlink:
        loopback = netlink.interface("lo").index
        _set(netlink, loopback, _OUTER, _ROOT, Options(seed=1), CREATE | EXCLUSIVE)
        return PRNG_SEED in attributes(_get(netlink, loopback, _OUTER).options[QOPT.size :])


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
        refuse(profile)
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
                inner, outer = (_get(netlink, target, handle) for handle in (_INNER, _OUTER))
                packets, total = redirected(netlink, netlink.interface(source).index)
                counters[str(way)] = _counters(packets, total, outer, inner)
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


def _counters(packets: int, total: int, outer: TrafficObject, inner: TrafficObject) -> Counters:
    """*packets*, *total*: that entered, and their bytes."""
    waiting, _, dropped, skipped = _queue(outer)
    delivered, _ = counted(outer.stats)  # packets that skip the delay skip the inner one, too
    queue = _queue(inner)[2]
    lost = max(0, dropped - queue)  # the outer one counts as its own what the inner one dropped,
    marked = 0
    if any(
        attributes(outer.options[QOPT.size :]).get(ECN, b"")
    ):  # and what it marks: then, lost is what is missing
        marked = lost
        lost = min(lost, max(0, packets - delivered - waiting - queue))
        marked -= lost
    return Counters(packets, total, lost, queue, 0.0, delivered=delivered, marked=marked, reordered=skipped)


def _queue(qdisc: TrafficObject) -> tuple[int, int, int, int]:
    """struct gnet_stats_queue: packets and bytes that wait, drops, and requeues, which are netem's reordered packets."""
    qlen, backlog, drops, requeues = struct.unpack_from("=IIII", qdisc.stats.get(3, bytes(20)))
    return qlen, backlog, drops, requeues
