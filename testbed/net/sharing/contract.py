"""What shares out a cell: a `Scheduler` is what people write, its `Turns` whose turn it is while packets come and go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar, Protocol

from testbed.kinds import Kind


class User(Protocol):
    """One direction of a link of the cell."""

    place: int
    """Which of the cell's links it is, from 0 on."""
    share: float
    """Of the cell's time, while it waits."""
    sent: float
    """Bytes that have crossed, ever."""

    @property
    def queue(self) -> Sequence[tuple[float, Any, Any, Any]]:
        """What waits, first that which is next; each begins with when it arrived."""

    def mean_rate(self, begin_s: float, end_s: float) -> float:
        """Bytes a second that it could send between two times if the cell were all its own."""


class Turns:
    """Whose turn it is in one direction of a cell."""

    until = inf
    """When it has to be asked again, in seconds of the packets' clock, even if nobody came or went."""

    @abstractmethod
    def share(self, waiting: Sequence[User], now: float) -> None:
        """Sets every waiting user's `share` of the cell's time from *now* on: from 0 to 1, together no more than 1."""


class Scheduler(Kind):
    """Base of the schedulers."""

    pooled: ClassVar[bool] = False
    """Whether all wait in one queue, whose size is then its limit for all together."""

    fixed: ClassVar[bool] = False
    """Whether a user's share does not depend on who else sends."""

    @abstractmethod
    def turns(self, members: Sequence[User]) -> Turns:
        """For one direction. *members* is the cell's own list: it changes as users join and leave."""

    def check(self, members: int) -> None:
        """Raises SpecError where it does not suit a cell of so many links."""

    def alone(self, place: int, members: int) -> float:
        """The share of its own rate that the link at this *place* of so many gets while no other sends."""
        return 1.0


class Fixed(Scheduler):
    """Base of those under which everybody has a part of the time, its `alone`, whether it is used or not."""

    fixed = True

    def turns(self, members: Sequence[User]) -> Turns:
        return _Parts(self, members)


class _Parts(Turns):
    def __init__(self, scheduler: Scheduler, members: Sequence[User]) -> None:
        self._scheduler, self._members = scheduler, members
        self._parts: list[float] = []  # by place; one that leaves keeps its own free

    def share(self, waiting: Sequence[User], now: float) -> None:
        count = self._members[-1].place + 1
        if count > len(self._parts):
            self._parts = [self._scheduler.alone(place, count) for place in range(count)]
        for user in waiting:
            user.share = self._parts[user.place]
