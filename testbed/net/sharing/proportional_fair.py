"""Proportional fairness, slot by slot as in a base station: to whose channel is best compared with what it has had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf

from testbed.kinds import Time
from testbed.net.sharing.contract import Scheduler, Turns, User


@dataclass(frozen=True)
class ProportionalFair(Scheduler):
    """A slot goes to whom the greatest rate ÷ average rate so far belongs; the average forgets exponentially.

    After a slot, ``average ← (1 - slot/average_s) × average + slot/average_s × served``, for all, with 0 served to all but one.
    What its holder leaves unused of a slot is lost, as in a base station; a slot that began with nobody waiting goes to whoever
    comes first. Among those never served the greatest rate is first, and then the user of the first link.
    """

    slot: Time = 1e-3
    average: Time = 1.0

    name = "proportional-fair"
    source = "Jalali, Padovani and Pankaj, Data throughput of CDMA-HDR, VTC 2000; Tse's form"

    def __post_init__(self) -> None:
        self.require("slot", "from 125us to 1s", 125e-6 <= self.slot <= 1)
        self.require("average", "from one slot to 1000s", self.slot <= self.average <= 1000)

    def turns(self, members: Sequence[User]) -> Turns:
        return _Turns(self.slot, self.slot / self.average)


class _Turns(Turns):
    until = -inf

    def __init__(self, slot_s: float, weight: float) -> None:
        self._slot_s, self._kept, self._weight = slot_s, 1 - weight, weight
        self._slot = 0  # the number of the one that runs
        self._holder: User | None = None
        self._before = 0.0  # what its holder had sent when it became that
        self._averages: dict[User, tuple[float, int]] = {}  # bytes a second, after the slot of that number

    def share(self, waiting: Sequence[User], now: float) -> None:
        if now >= self.until:
            self._close()
            self._slot = floor(now / self._slot_s)
            if (self._slot + 1) * self._slot_s <= now:  # rounding
                self._slot += 1
            self.until = (self._slot + 1) * self._slot_s
        if self._holder is None:
            self._holder = self._choose(waiting, now)
        for user in waiting:
            user.share = float(user is self._holder)

    def _choose(self, waiting: Sequence[User], now: float) -> User | None:
        best, chosen = (0.0, 0.0), None
        for user in waiting:
            rate = user.mean_rate(now, self.until)
            average = self._average(user)
            worth = (rate / average if average else inf, rate) if rate else (0.0, 0.0)
            if worth > best:
                best, chosen = worth, user
        if chosen is not None:
            self._before = chosen.sent
        return chosen

    def _average(self, user: User) -> float:
        """Before the slot that runs."""
        value, after = self._averages.get(user, (0.0, 0))
        return value * self._kept ** (self._slot - 1 - after) if value else 0.0

    def _close(self) -> None:
        """The slot that ran is over."""
        user, self._holder = self._holder, None
        if user is not None:
            served = (user.sent - self._before) / self._slot_s
            self._averages[user] = (self._kept * self._average(user) + self._weight * served, self._slot)
