"""CoDel, RFC 8289: drops (or marks) what has waited too long for too long, ever more often until it helps."""

from __future__ import annotations

from math import sqrt


class CoDel:
    """The control law. It is asked about each packet that comes to the head of the queue, in order."""

    def __init__(self, target_s: float, interval_s: float, mtu: int) -> None:
        self.target_s, self.interval_s, self.mtu = target_s, interval_s, mtu
        self._above_until: float | None = None  # when the wait will have been too long for an interval
        self._dropping = False
        self._next = 0.0
        self._count = self._last_count = 0

    def condemns(self, waited_s: float, now: float, backlog_bytes: float) -> bool:
        """Whether this packet is to be dropped: it waited so long, and so much waits behind and with it.

        A packet that is marked instead counts as dropped.
        """
        too_long = self._too_long(waited_s, now, backlog_bytes)
        if self._dropping:
            if not too_long:
                self._dropping = False
            elif now >= self._next:
                self._count += 1
                self._next += self.interval_s / sqrt(self._count)
                return True
            return False
        if not too_long:
            return False
        self._dropping = True
        # Soon after the last time: go on about as often as it took then.
        recent = self._count - self._last_count
        self._count = recent if recent > 1 and now - self._next < 16 * self.interval_s else 1
        self._last_count = self._count
        self._next = now + self.interval_s / sqrt(self._count)
        return True

    def _too_long(self, waited_s: float, now: float, backlog_bytes: float) -> bool:
        if waited_s < self.target_s or backlog_bytes <= self.mtu:
            self._above_until = None
            return False
        if self._above_until is None:
            self._above_until = now + self.interval_s
            return False
        return now >= self._above_until
