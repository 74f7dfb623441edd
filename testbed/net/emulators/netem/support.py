"""What netem, and this kernel's, can honour of a profile, found out before anything is touched; the rest is refused."""

from __future__ import annotations

import errno
import functools
from typing import TYPE_CHECKING, Literal

from testbed.errors import UsageError
from testbed.net.emulators.emulator import refuse_unknown
from testbed.net.emulators.netem.hierarchy import gives_rate, plan
from testbed.net.emulators.netem.options import PRNG_SEED, QOPT, Options
from testbed.net.emulators.netem.qdiscs import (
    OUTER,
    ROOT,
    CoDelQueue,
    Encodable,
    Part,
    Plug,
    TokenBucket,
    get,
    put,
)
from testbed.net.netlink import CREATE, EXCLUSIVE, Netlink, RefusedError, attributes
from testbed.net.profile.conditions import MTU

if TYPE_CHECKING:
    from testbed.net.profile.conditions import Direction, Profile

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

_WAYS: tuple[Literal["up"], Literal["down"]] = ("up", "down")


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
            part = Part(OUTER, ROOT, kind, _SAMPLES[kind])
            put(netlink, netlink.interface("lo").index, part, CREATE | EXCLUSIVE)
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
    honoured = HONOURED | {"seed"} if seeded and knows_seeds() else HONOURED
    refuse_unknown("netem", profile, honoured, "use --emulator userspace")
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


def knows_seeds() -> bool:
    """Whether this kernel's netem says back the seed it was given: those before 6.6 ignore it."""
    with Netlink(None) as netlink:
        loopback = netlink.interface("lo").index
        put(netlink, loopback, Part(OUTER, ROOT, "netem", Options(seed=1)), CREATE | EXCLUSIVE)
        return PRNG_SEED in attributes(get(netlink, loopback, OUTER).options[QOPT.size :])
