"""One queue for all, first come, first served: how it is shared is up to the congestion control of those who send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.net.sharing.contract import Scheduler, Turns, User


@dataclass(frozen=True)
class Tcp(Scheduler):
    """One drop-tail queue for all: plain competition, each packet sent at its own link's rate."""

    name = "tcp"
    source = "first come, first served"
    pooled = True

    def turns(self, members: Sequence[User]) -> Turns:
        return _Turns()


class _Turns(Turns):
    def share(self, waiting: Sequence[User], now: float) -> None:
        first = min(waiting, key=lambda user: user.queue[0][0])
        for user in waiting:
            user.share = 0.0
        first.share = 1.0
