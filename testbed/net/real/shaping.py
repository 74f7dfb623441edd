"""A link between hosts under a profile: netem on one of them, both ways, for what passes between it and the other alone.

    with Shaping(host, "eth0", peer="192.168.7.3", egress="up") as shaping:
        shaping.apply(profile), shaping.check(), shaping.counters()

`shaper.py` does there what takes root; what netem is to be told is made here, and what the kernel says it has compared with it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed import descriptors
from testbed.deadline import Deadline
from testbed.errors import NetworkError, UsageError
from testbed.hosts.host import Host, Process
from testbed.hosts.local import Local
from testbed.net.emulators.emulator import Counters
from testbed.net.emulators.netem.counters import Dropped, dropped_by, link_counters
from testbed.net.emulators.netem.options import BOTTLENECKS, Hierarchy, hierarchy
from testbed.net.emulators.netem.qdiscs import BUCKET, CODEL, OUTER
from testbed.net.emulators.netem.redirect import redirects
from testbed.net.netlink import TCA_OPTIONS, TrafficObject, attribute, described
from testbed.net.real import shaper

if TYPE_CHECKING:
    from testbed.net.profile.profile import Profile
    from testbed.net.profile.trace import Way

_ANSWER_S = 30.0
_NOTHING = Counters(0, 0, 0, 0, 0.0)
#: As root, or by sudo, which is told of one Python by its path; the helper cannot see by which connection its user came.
_AS_ROOT = (
    "python=/usr/bin/python3; [ -x $python ] || python=python3; "
    'if [ "$(id -u)" = 0 ]; then exec $python "$@" "$SSH_CONNECTION"; '
    'else exec sudo -n -- $python "$@" "$SSH_CONNECTION"; fi'
)


def _start(host: Host) -> Process:
    argv = ["sh", "-c", _AS_ROOT, "sh", "-I", "-S", "-c", inspect.getsource(shaper)]
    # A program of this machine's could never become root.
    return host.start_as_root(argv) if isinstance(host, Local) else host.start(argv, {})


class Shaping:
    """What passes between a host's interface and a peer's IPv4 address. A context manager; leaving it undoes all.

    `egress`: which way of the link leaves the host. `ssh`: addresses to which SSH connections go that `interface` must not carry,
    unless `force`; the one by which the host itself is reached is found there. `spare`: TCP ports, at either end, of what is
    never shaped. Entering it raises UsageError where it is refused, NetworkError where the kernel refuses.
    """

    def __init__(
        self,
        host: Host,
        interface: str,
        peer: str,
        egress: Way = "up",
        *,
        force: bool = False,
        ssh: Sequence[str] = (),
        spare: Sequence[int] = (),
    ) -> None:
        self._host, self._what = host, f"shaping {interface}"
        asked = {"interface": interface, "peer": peer, "force": force, "ssh": [*ssh], "spare": [*spare]}
        self._asked = asked
        other: Way = "down" if egress == "up" else "up"
        self._hooks: dict[Way, str] = {egress: "egress", other: "ingress"}
        self._process: Process | None = None
        self._mtu = 0
        self._profile: Profile | None = None
        self._planned: dict[Way, Hierarchy] = {}
        self._base: dict[Way, tuple[int, int]] = {"up": (0, 0), "down": (0, 0)}
        self._past: dict[Way, Counters] = {"up": _NOTHING, "down": _NOTHING}

    def __enter__(self) -> Shaping:
        self._process = _start(self._host)
        try:
            self._mtu = self._ask(self._asked)["mtu"]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Undo all. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.status(_ANSWER_S)  # it undoes, and is not to be killed at that
        process.stop()

    def apply(self, profile: Profile) -> None:
        """Another profile, which is steady. What is under way is lost. Raises UsageError, NetworkError."""
        if profile == self._profile:
            return
        if self._profile is not None:
            self._past = self._counted()
            self._base = {way: redirected for way, (_, redirected) in self._read().items()}
        self._profile, self._planned = None, {}
        for way, hook in self._hooks.items():
            seed = profile.ways[way].seed
            planned = hierarchy(profile, way, self._mtu, seed, None, 0.0)
            qdiscs = [
                [
                    each.handle,
                    each.parent,
                    each.kind,
                    (attribute(TCA_OPTIONS, each.options.encode()) + stab).hex(),
                ]
                for each in planned.qdiscs
                for stab in [planned.stab if each.handle == OUTER else b""]
            ]
            self._ask({"do": "put", "way": hook, "qdiscs": qdiscs})
            self._planned[way] = planned
        self.check()
        self._profile = profile

    def check(self) -> None:
        """Raises NetworkError where it ended, or the kernel has anything else than was asked for."""
        for way, (qdiscs, _) in self._read().items():
            for asked in self._planned[way].qdiscs if way in self._planned else ():
                if asked.handle not in qdiscs:
                    raise NetworkError(f"{self._what} ({way}): its {asked.kind} is gone")
                if wrong := asked.options.differences(qdiscs[asked.handle].options):
                    raise NetworkError(f"{self._what} ({way}): {asked.kind} differs: {'; '.join(wrong)}")

    def counters(self) -> dict[str, Counters]:
        """What passed since it began, each way."""
        return {str(way): counted for way, counted in self._counted().items()}

    def _counted(self) -> dict[Way, Counters]:
        found = {}
        for way, (qdiscs, (packets, total)) in self._read().items():
            inner = next((qdiscs[handle] for handle in BOTTLENECKS if handle in qdiscs), None)
            if inner is None or OUTER not in qdiscs:
                found[way] = self._past[way]
                continue
            dropped = dropped_by(inner, qdiscs.get(CODEL) if inner.handle == BUCKET else None)
            before, bytes_before = self._base[way]
            now = link_counters(packets - before, total - bytes_before, qdiscs[OUTER], Dropped(*dropped))
            found[way] = self._past[way].plus(now)
        return found

    def _read(self) -> dict[Way, tuple[dict[int, TrafficObject], tuple[int, int]]]:
        answer = self._ask({"do": "read"})
        read: dict[Way, Any] = {}
        for way, hook in self._hooks.items():
            qdiscs = [described(bytes.fromhex(each)) for each in answer[hook]["qdiscs"]]
            filters = [described(bytes.fromhex(each)) for each in answer[hook]["filters"]]
            passed = redirects(filters)
            if passed is None:
                raise NetworkError(f"{self._what} ({way}): its filter is gone")
            read[way] = {each.handle: each for each in qdiscs}, passed
        return read

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        return _asked(self._process, order, self._what)


def _asked(process: Process | None, order: dict[str, Any], what: str) -> dict[str, Any]:
    if process is None:
        raise NetworkError(f"{what}: it is over")
    data, deadline = b"", Deadline(_ANSWER_S)
    try:
        os.write(process.stdin.fileno(), json.dumps(order).encode() + b"\n")
        while not data.endswith(b"\n"):
            if descriptors.ready([process.stdout], deadline.left()):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    break
                data += piece
    except TimeoutError:
        raise NetworkError(f"{what}: no answer within {deadline}") from None
    except (OSError, ValueError):
        data = b""
    if not data.endswith(b"\n"):
        process.status(1.0)
        words = process.last_words()
        if "sudo" in words:
            raise UsageError(f"{what}: takes root there, or sudo without a password ({words})")
        raise NetworkError(f"{what}: what does it has ended{words and ': ' + words}")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise (UsageError if answer.get("usage") else NetworkError)(f"{what}: {answer['error']}")
    return answer


def clean(host: Host) -> list[str]:
    """The interfaces of a host that a dead run had left shaped, and that are so no longer. Raises UsageError, NetworkError."""
    with _start(host) as process:
        return list(_asked(process, {"clean": True}, "what was shaped")["undone"])
