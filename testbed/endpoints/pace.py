"""A slower machine, emulated: a stage that has computed is followed by waiting, in real time, until it took N times as long."""

from __future__ import annotations

import time


class Pace:
    """How many times slower than this host an endpoint computes. 1 waits for nothing.

    The wait is part of the measured path: it stands where the slower machine would still compute, so that what follows
    (a transmission, the next token) begins as late as it would there. Only compute is stretched, never the link.
    """

    def __init__(self, slowdown: float = 1.0) -> None:
        self.slowdown = slowdown
        self._since = time.monotonic()

    def begin(self) -> float:
        """A stretch of computing begins; returns the time, in seconds of the monotonic clock."""
        self._since = time.monotonic()
        return self._since

    def hold(self) -> float:
        """Wait for what the computing since `begin` (or the last `hold`) would have taken longer; returns the time."""
        if self.slowdown > 1.0:
            computed = time.monotonic() - self._since
            until = self._since + computed * self.slowdown
            while (left := until - time.monotonic()) > 0:
                time.sleep(left)
        return self.begin()
