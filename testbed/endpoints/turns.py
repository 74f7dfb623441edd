"""Turns at computing: one at a time, and whoever had one goes behind all who wait."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A device on which one thing is computed at a time, for callers that are known by a name."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: callers in the order of their turns, each with its own tickets in the order in which they came
        self._waiting: OrderedDict[str, deque[object]] = OrderedDict()
        self._computing = False

    @contextmanager
    def turn(self, caller: str) -> Iterator[None]:
        """Wait for this caller's turn, and compute."""
        self.take(caller)
        try:
            yield
        finally:
            self.give()

    def take(self, caller: str) -> None:
        """Wait for this caller's turn, which lasts until `give`."""
        ticket = object()
        with self._changed:
            self._waiting.setdefault(caller, deque()).append(ticket)
            self._changed.wait_for(lambda: not self._computing and self._next() is ticket)
            own = self._waiting.pop(caller)
            own.popleft()
            if own:
                self._waiting[caller] = own
            self._computing = True

    def give(self) -> None:
        """The turn is over."""
        with self._changed:
            self._computing = False
            self._changed.notify_all()

    def _next(self) -> object:
        return next(iter(self._waiting.values()))[0]
