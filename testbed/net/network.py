"""What a run asks of the network between its nodes, whatever that is made of: namespaces on this host, or nothing at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from testbed.net.profile.profile import Profile

if TYPE_CHECKING:
    from testbed.hosts.host import Host, Process
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Counters


class Network(Protocol):
    """Nodes, and the links between them. Its ``with`` block's end takes it away."""

    @property
    def emulation(self) -> str:
        """What imposes conditions on its links, as rows name it; ``none``: there are no links."""
        ...

    @property
    def apart(self) -> bool:
        """Whether its nodes are machines of their own, with processors that nobody else's node uses."""
        ...

    @property
    def closed(self) -> bool:
        """Whether strangers may reach its nodes, so that requests cross closed to them."""
        ...

    @property
    def one_clock(self) -> bool:
        """Whether all nodes' monotonic clocks are one."""
        ...

    def described(self) -> dict[str, dict[str, Any]]:
        """By node, what there is to say of its host; empty: all are this machine."""
        ...

    def host(self, node: str) -> Host:
        """Where a node's processes run. Raises SpecError: no such node."""
        ...

    def address(self, node: str, link: str | None = None) -> str:
        """The node's address, on the named link or on its first. Raises SpecError: no such node or link."""
        ...

    def record_process(self, pid: int, started: int | None = None, what: str = "helper") -> None:
        """Notes a process that runs on a node, for whoever cleans up should this one die."""
        ...

    def watching(self, process: Process, what: str) -> AbstractContextManager[None]:
        """While the block runs, `check` looks after a process on which conditions depend, such as background traffic."""
        ...

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        """Puts the link under another profile, whose traces begin at `origin_s` (CLOCK_MONOTONIC; None: now)."""
        ...

    def settle(self, link: str, patience_s: float | None = None) -> bool:
        """Waits until nothing is under way on the link any more; whether that was so before `patience_s` were over."""
        ...

    def hurry(self, link: str) -> bool:
        """Has the link carry at once whatever it carries, until `apply`: of what is measured no more. Whether it does."""
        ...

    def counters(self, link: str) -> Mapping[str, Counters]:
        """What crossed the link each way since it is there; empty where nobody counts."""
        ...

    def calibrate(self, link: str, profile: Profile) -> Calibration:
        """Measures the link, which is under this profile and idle."""
        ...

    def check(self) -> None:
        """Raises NetworkError where something that a link, or what crosses it, depends on has ended or stands still."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
