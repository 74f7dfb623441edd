"""A fixed share for everybody, whether it is used or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.net.sharing.contract import Scheduler, Turns, User


@dataclass(frozen=True)
class Reserved(Scheduler):
    """Everybody has the same part of the time reserved; what is not used is lost."""

    name = "reserved"
    source = "static equal allocation, the baseline of allocation by what is to be sent"
    fixed = True

    def turns(self, members: Sequence[User]) -> Turns:
        return _Turns(members)

    def alone(self, place: int, members: int) -> float:
        return 1 / members


class _Turns(Turns):
    def __init__(self, members: Sequence[User]) -> None:
        self._members = members

    def share(self, waiting: Sequence[User], now: float) -> None:
        each = 1 / len(self._members)
        for user in waiting:
            user.share = each
