"""When something must be whole: one moment for all the steps that it takes."""

from __future__ import annotations

import time


class Deadline:
    """A moment on the monotonic clock, `timeout` seconds from now; None: there is none."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._at = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds until then, as `socket.settimeout` takes them. Raises TimeoutError where it has passed."""
        if self._at is None:
            return None
        if (left := self._at - time.monotonic()) <= 0:
            raise TimeoutError
        return left

    def passed(self, moment: float) -> bool:
        """Whether it lies before a moment of the monotonic clock."""
        return self._at is not None and self._at < moment

    def __str__(self) -> str:
        return "any time" if self.timeout is None else f"{self.timeout:g} s"
