"""No network: every node is this host, and what one sends another crosses nothing that could be shaped, measured or counted."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed.errors import NetworkError
from testbed.hosts.host import Host, Process, host
from testbed.net.profile.profile import Direction, Profile

if TYPE_CHECKING:
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Counters

#: No conditions at all. Its name is what rows say of their link.
LOOPBACK = Profile("loopback", Direction(), Direction(), "no link: two threads of one process")


class Loopback:
    """A `Network` without links."""

    emulation = "none"
    apart = closed = False
    one_clock = True

    def described(self) -> dict[str, dict[str, Any]]:
        return {}

    def host(self, node: str) -> Host:
        """This machine."""
        return host("local")

    def address(self, node: str, link: str | None = None) -> str:
        """Every node's."""
        return "127.0.0.1"

    def record_process(self, pid: int, started: int | None = None, what: str = "helper") -> None:
        """Nothing is left behind that would have to be found."""

    def watching(self, process: Process, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def apply(self, link: str, profile: Profile, origin_s: float | None = None) -> None:
        """There is no link to be changed."""

    def settle(self, link: str, patience_s: float | None = None) -> bool:
        """Nothing is ever under way."""
        return True

    def hurry(self, link: str) -> bool:
        """No link is slow."""
        return False

    def counters(self, link: str) -> dict[str, Counters]:
        """Nobody counts."""
        return {}

    def calibrate(self, link: str, profile: Profile) -> Calibration:
        """Raises NetworkError: there is no link to be measured."""
        raise NetworkError("loopback is no link that could be measured")

    def check(self) -> None:
        """There is nothing that could fail."""

    def __enter__(self) -> Loopback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
