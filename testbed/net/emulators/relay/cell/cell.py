"""One direction of a cell: its users' packets, and the medium that they share.

    user 1: enter ─ impairments ─▶ flight ─▶ queue ─┐
    user 2: enter ─ impairments ─▶ flight ─▶ queue ─┼ a share of the time each, at one's own rate ─▶ deliver
    user 3: …                                       ┘

Between two events (a packet arrives or has been sent, a rate changes, a slot ends) every share is constant, so when the next
packet will have been sent is known. All times are logical, as a `Line`'s are. A packet that was read so late that what happened
after its arrival has happened already arrives then: never, where the delay in front of the cell is longer than the relay is late.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from testbed.net.emulators.relay.cell.user import User
from testbed.net.sharing.contract import Scheduler


class Cell:
    """Times are seconds of CLOCK_MONOTONIC."""

    flight = ()  # as a `Line`'s: what has to be looked at although nothing leaves yet; here, all that is an event

    def __init__(self, scheduler: Scheduler) -> None:
        self.members: list[User] = []
        self.leaves = inf  # when something happens next
        self._pooled, self._turns = scheduler.pooled, scheduler.turns(self.members)
        self._joined = 0  # users, ever
        self._clock = 0.0  # up to when everything has happened
        self._waiting: list[User] = []

    def follow(self, scheduler: Scheduler, now: float) -> None:
        """Be shared out so from *now* on."""
        self.advance(now)
        self._happen(max(now, self._clock))
        self._pooled, self._turns = scheduler.pooled, scheduler.turns(self.members)
        self.plan()

    def join(self, deliver: Callable[[bytes], object], seed: int | None) -> User:
        """One more user, whose packets leave by *deliver*."""
        user = User(deliver, seed, self, self._joined)
        self._joined += 1
        self.members.append(user)
        return user

    def leave(self, user: User) -> None:
        """Ends a user; what it has under way is lost."""
        self.members.remove(user)
        self.plan()

    @property
    def queue(self) -> list[User]:
        """Those that wait for the medium, or have it."""
        return self._waiting

    def expect(self, arrival: float) -> None:
        """A packet will arrive then."""
        if arrival < self.leaves:
            self.leaves = arrival

    def full_for(self, user: User) -> bool:
        """Whether a user's first packet, too, has to find room: where all wait in one queue, and somebody does."""
        return self._pooled and any(each.queue for each in self.members)

    def waiting_bytes(self, user: User) -> float:
        """What waits, and is not being sent, in the queue where this user's packets do."""
        if not self._pooled:
            return user.waiting_bytes
        heads = sum(each.queue[0][2] for each in self.members if each.queue and not each.share)
        return heads + sum(each.waiting_bytes for each in self.members)

    def advance(self, now: float) -> None:
        """Everything that happens up to *now*, in the order in which it happens."""
        while self.leaves <= now:
            self._happen(max(self.leaves, self._clock))
            self.plan()

    def _happen(self, time_s: float) -> None:
        elapsed = time_s - self._clock
        self._clock = time_s
        finished = []
        for user in self._waiting:
            sent = user.left if user.done <= time_s else user.speed * elapsed
            user.left -= sent
            user.sent += sent
            if user.done <= time_s:
                finished.append(user)
        for user in finished:
            user.finish(time_s)
        for user in self.members:
            if user.flight and user.flight[0][0] <= time_s:
                user.arrive(time_s)

    def plan(self) -> None:
        """Shares the time out anew, and finds out what happens next."""
        now, following = self._clock, inf
        self._waiting = waiting = [user for user in self.members if user.queue]
        if waiting:
            self._turns.share(waiting, now)
            following = self._turns.until
        for user in waiting:
            user.speed, user.done = 0.0, inf
            if user.share:
                rate, until = user.rate(now)
                user.speed = rate * user.share
                if user.speed:
                    user.done = now + user.left / user.speed
                following = min(following, user.done, until)
        for user in self.members:
            if user.flight and user.flight[0][0] < following:
                following = user.flight[0][0]
        self.leaves = following
