"""Equal shares of the time for those that wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.net.sharing.contract import Scheduler, Turns, User


@dataclass(frozen=True)
class Equal(Scheduler):
    """Everybody who waits gets the same share of the time: processor sharing."""

    name = "equal"
    source = "Parekh and Gallager, A generalized processor sharing approach to flow control, 1993"

    def turns(self, members: Sequence[User]) -> Turns:
        return _Turns()


class _Turns(Turns):
    def share(self, waiting: Sequence[User], now: float) -> None:
        each = 1 / len(waiting)
        for user in waiting:
            user.share = each
