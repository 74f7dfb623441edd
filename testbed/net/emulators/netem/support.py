"""What netem, and this kernel's, can honour of a profile, found out before anything is touched; the rest is refused."""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING

from testbed.errors import UsageError
from testbed.net.emulators.emulator import refuse_unknown
from testbed.net.emulators.netem.options import PRNG_SEED, QOPT, Options, hierarchy
from testbed.net.emulators.netem.qdiscs import (
    OUTER,
    ROOT,
    CoDelQueue,
    Encodable,
    Plug,
    Qdisc,
    TokenBucket,
    get,
    put,
)
from testbed.net.netlink import CREATE, EXCLUSIVE, Netlink, RefusedError, attributes
from testbed.net.profile.conditions import MTU

if TYPE_CHECKING:
    from testbed.net.profile.conditions import Direction, Profile
    from testbed.net.profile.trace import Way

HONOURED = frozenset(
    {"jitter law", "jitter reorder", "loss model", "codel", "duplicate", "corrupt", "reorder", "ecn"}
    | {"overhead", "mtu", "trace"}
)
"""What of `Direction.beyond_the_basics` this emulator knows; where the kernel knows of seeds, those as well."""


def available() -> bool:
    """Whether this kernel has netem, found out by asking for one in a scratch namespace. Raises UsageError without root."""
    return _has("netem")


def require() -> None:
    """Raises UsageError when this kernel has no netem."""
    if not available():
        raise UsageError(
            "emulator netem: this kernel has no sch_netem (try modprobe sch_netem); use --emulator userspace or auto"
        )


@functools.cache
def _has(kind: str) -> bool:
    """Whether this kernel has such a qdisc. Raises UsageError without root."""
    with Netlink(None) as netlink:
        try:
            qdisc = Qdisc(OUTER, ROOT, kind, _SAMPLES[kind])
            put(netlink, netlink.interface("lo").index, qdisc, CREATE | EXCLUSIVE)
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
    seeded = any(direction.seed is not None for direction in profile.ways.values())
    honoured = HONOURED | {"seed"} if seeded and knows_seeds() else HONOURED
    refuse_unknown("netem", profile, honoured, "use --emulator userspace")
    require_loadless(profile)
    for way, direction in profile.ways.items():
        if beside := _conflict(direction, way):
            raise UsageError(
                f"emulator netem cannot honour {beside[0]} beside {beside[1]} ({way}); use --emulator userspace"
            )
        for qdisc in hierarchy(profile, way, MTU, None, direction.schedule(way, 0.0), 0.0).inner:
            if qdisc.kind in _SAMPLES and qdisc.kind != "netem" and not _has(qdisc.kind):
                raise UsageError(
                    f"emulator netem: for {profile} ({way}) this kernel has no sch_{qdisc.kind} "
                    f"(try modprobe sch_{qdisc.kind}); use --emulator userspace"
                )


def require_loadless(profile: Profile) -> None:
    """Raises UsageError where a trace has a delay of its own for packets that enter under load."""
    for way, direction in profile.ways.items():
        schedule = direction.schedule(way, 0.0)
        if schedule is not None and schedule.loaded_delays is not None:
            raise UsageError(
                f"emulator netem cannot tell packets that enter under load from others ({way}, '{direction.trace}' has a "
                "loaded_delay); use --emulator userspace"
            )


def _conflict(direction: Direction, way: Way) -> tuple[str, str] | None:
    """Two things that netem can honour one at a time, as they are written."""
    written = direction.beyond_the_basics()
    schedule = direction.schedule(way, 0.0)
    traced = schedule is not None and schedule.gives_rate
    if direction.reorder and (direction.rate_bps is not None or traced):
        # A packet that skips the delay skips whatever is inside of that netem: the rate and its queue.
        return repr(written["reorder"]), "a rate"
    if direction.queue.codel is not None and traced:
        return repr(written["codel"]), f"'{direction.trace}'"
    if schedule is not None and (schedule.delays is not None or schedule.losses is not None):
        # With every change, netem begins its chain and its random numbers anew.
        for name in ("loss model", "seed"):
            if name in written:
                return repr(written[name]), f"'{direction.trace}'"
    return None


def knows_seeds() -> bool:
    """Whether this kernel's netem says back the seed it was given: those before 6.6 ignore it."""
    with Netlink(None) as netlink:
        loopback = netlink.interface("lo").index
        put(netlink, loopback, Qdisc(OUTER, ROOT, "netem", Options(seed=1)), CREATE | EXCLUSIVE)
        return PRNG_SEED in attributes(get(netlink, loopback, OUTER).options[QOPT.size :])
