"""What every link emulator provides, and the refusal of what one does not know of: no approximation in silence."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from testbed.errors import UsageError
from testbed.hosts.namespaces import call_inside
from testbed.units import format_time

if TYPE_CHECKING:
    from testbed.net.profile.profile import Profile


@dataclass(frozen=True)
class Counters:
    """One direction of a link since it was attached. Bytes are the network layer's (IP header and up)."""

    packets: int  # that entered
    bytes: int
    dropped_loss: int  # by the profile's random loss
    dropped_queue: int  # because the profile's queue was full
    worst_lateness_s: float  # a packet's leaving after its logical time; 0 where the emulator cannot know
    delivered: int = 0  # packets that left
    overrun: int = 0  # that the emulator itself lost, because it could not keep up
    # What follows an emulator may not be able to tell: 0.
    dropped_aqm: int = 0  # by the queue's management (CoDel)
    marked: int = 0  # congestion experienced, instead of lost or dropped
    duplicated: int = 0
    corrupted: int = 0
    reordered: int = 0
    cleared: int = 0  # that were under way when the link was put under other conditions, and dropped: no loss of any profile's
    # Of two readings the greater maximum says nothing about the time between them, hence this one:
    recent_lateness_s: float = 0.0  # the worst since the counters were last read, by whomever

    def since(self, before: Counters) -> Counters:
        """What was counted after *before*, the reading just before this one; the worst lateness is that of between."""
        return self._with(before, -1, self.recent_lateness_s)

    def plus(self, other: Counters) -> Counters:
        """Both stretches of time together."""
        return self._with(other, 1, max(self.worst_lateness_s, other.worst_lateness_s))

    def complaints(self, way: str, late_s: float) -> list[str]:
        """Where the emulator could not keep up, in words: it was later than *late_s* (seconds), or lost packets itself."""
        complaints = []
        if self.worst_lateness_s > late_s:
            complaints.append(f"{way}: the emulator was late by up to {format_time(self.worst_lateness_s)}")
        if self.overrun > 0:
            complaints.append(f"{way}: the emulator lost {self.overrun} packets")
        return complaints

    def record(self) -> dict[str, Any]:
        """For JSON, of a stretch of time (see `since`): every counter, and one lateness."""
        return {name: value for name, value in asdict(self).items() if name != "recent_lateness_s"}

    def _with(self, other: Counters, sign: int, lateness_s: float) -> Counters:
        others = asdict(other)
        counts = {n: v + sign * others[n] for n, v in asdict(self).items() if not n.endswith("_s")}
        return Counters(**counts, worst_lateness_s=lateness_s, recent_lateness_s=lateness_s)


@dataclass(frozen=True)
class Wanted:
    """A link that conditions are to be imposed on: its name, its two interfaces in the wire, and the conditions."""

    link: str
    a: str
    b: str
    profile: Profile
    cell: tuple[str, str] | None = None
    """The cell that it is in: its name, and how it is shared out."""


class Attachment(ABC):
    """One link with conditions imposed on it."""

    process: tuple[int, int] | None = None
    """Pid and start time (clock ticks since boot) of the process behind it, if there is one."""

    @abstractmethod
    def apply(self, profile: Profile, origin_s: float | None = None, *, fresh: bool = False) -> None:
        """Changes the conditions of what enters from now on; packets under way stay and keep their order, connections survive.

        *origin_s*: when the profile's traces begin, on the clock CLOCK_MONOTONIC; None: now. Both ways' begin together.
        *fresh*: packets under way are dropped (`Counters.cleared`), so that nothing of before is met.
        """

    def hurry(self) -> bool:
        """Carries what is under way, and all that enters until conditions are applied again, at once: whether it can."""
        return False

    @abstractmethod
    def under_way(self) -> int:
        """How many packets are on the link, both ways."""

    @abstractmethod
    def counters(self) -> dict[str, Counters]:
        """``{"up": …, "down": …}``."""

    def share(self, scheduler: str) -> None:
        """Has the cell that the link is in be shared out by another scheduler. Raises UsageError where there can be none."""
        raise UsageError("this emulator knows one link at a time, and no cell")

    def fate(self) -> str | None:
        """What has become of a process behind the link that serves it no longer, for a sentence; None: all is well."""
        return None

    @abstractmethod
    def detach(self) -> None:
        """Ends the emulation: nothing crosses the link any more, and nothing of the emulator is left. May be called twice."""


class Emulator(ABC):
    """A way of imposing a profile on a link."""

    name: ClassVar[str]
    served_by_processes: ClassVar[bool] = False
    """Whether ordinary processes carry the packets, so that those who measure the link may be urgent, too; else the kernel's own
    threads do, which an urgent process would hold up."""
    least_correlation: ClassVar[float] = 0.99
    """Of what arrives in each tenth of a second with the trace that it follows, at least; see `Curve.checks`."""
    most_off: ClassVar[float] = 0.02
    """Of what arrives over a stretch of a trace, the fraction that may be too much or too little."""

    def __init__(self, seed: int | None = None) -> None:
        """*seed* fixes the random losses and delays."""
        self._seed = seed

    @classmethod
    def require(cls) -> None:
        """Raises UsageError when this machine cannot run it."""
        return

    @classmethod
    def available(cls) -> bool:
        """Whether this machine can run it. Raises UsageError where that takes root to find out."""
        return True

    @abstractmethod
    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """Imposes *profile* on what passes between interfaces *a* and *b* of the namespace *wire* (*up* is a to b).

        With *keep* (a directory) whatever runs outlives this process and `reattach` finds it there.
        """

    @abstractmethod
    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """The attachment that an earlier `attach` with the same arguments made. Raises NetworkError when it is gone."""

    def attach_all(
        self, wire: str, wanted: Sequence[Wanted], *, keep: Path | None = None
    ) -> Sequence[Attachment]:
        """An attachment for each link that is wanted, in that order; when one fails, none stays. See `attach`."""
        for link in wanted:
            if link.cell is not None:
                raise UsageError(
                    f"emulator {self.name} cannot share out cell {link.cell[0]} ({link.cell[1]}): it knows one link at a time; "
                    "use --emulator userspace"
                )
        attachments: list[Attachment] = []
        try:
            for link in wanted:
                attachments.append(self.attach(wire, link.link, link.a, link.b, link.profile, keep=keep))
        except BaseException:
            for attachment in attachments:
                with contextlib.suppress(Exception):  # the first failure is the one to tell
                    attachment.detach()
            raise
        return attachments

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Ends the emulation of links whose wire is about to be removed, and takes everything on it along."""
        for attachment in attachments:
            with contextlib.suppress(Exception):
                attachment.detach()

    def super_packets(self, profile: Profile) -> dict[str, int]:
        """How many TCP segments may enter a link as one packet under *profile*, each way; 1: only real packets."""
        return {"up": 1, "down": 1}


def quieten(wire: str) -> None:
    """Switches IPv6 off in the wire's namespace, whose interfaces would otherwise send neighbour discovery of their own."""

    def write() -> None:
        for scope in ("all", "default"):
            switch = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
            if switch.exists():
                switch.write_text("1")

    call_inside(wire, write)


def refuse_unknown(emulator: str, profile: Profile, honoured: Set[str], remedy: str = "") -> None:
    """Raises UsageError that names the first thing in *profile* that is not in *honoured*.

    See `Direction.beyond_the_basics` for the names.
    """
    for way, direction in profile.ways.items():
        for name, written in direction.beyond_the_basics().items():
            if name not in honoured:
                raise UsageError(
                    f"emulator {emulator} cannot honour {written!r} ({way}, {name}){remedy and '; ' + remedy}"
                )
