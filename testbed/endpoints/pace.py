"""A slower machine, emulated: a stage that has computed is followed by waiting, in real time, until it took N times as long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def wait_until(moment: float) -> None:
    """Sleep to a moment of the monotonic clock; one that has passed waits for nothing."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(left)


class Pace:
    """How many times slower than this host an endpoint computes. 1 waits for nothing.

    The wait is part of the measured path: it stands where the slower machine would still compute, so that what follows
    (a transmission, the next token) begins as late as it would there. Only compute is stretched, never the link.

    device: where it computes. A GPU is waited for, as what it was given is not done when the call that gave it returns.
    """

    def __init__(self, slowdown: float = 1.0, device: torch.device | None = None) -> None:
        self.slowdown, self.device = slowdown, device
        self._since = time.monotonic()

    def begin(self) -> float:
        """A stretch of computing begins; returns the time, in seconds of the monotonic clock."""
        self._since = time.monotonic()
        return self._since

    def hold(self) -> float:
        """Wait for what the computing since `begin` (or the last `hold`) would have taken longer; returns the time."""
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        if self.slowdown > 1.0:
            computed = time.monotonic() - self._since
            wait_until(self._since + computed * self.slowdown)
        return self.begin()
