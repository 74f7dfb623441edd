"""Whom the cloud talks to: so many peers at a time. Where one more comes, the one that has been silent longest goes."""

from __future__ import annotations

import threading

from testbed.transport.transport import Stream


class Admission:
    """The connections that are open. A peer is silent until a request's header has come from it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._open: set[Stream] = set()

    def admit(self, connection: Stream) -> bool:
        """Let a connection in, in another's place where there is no room; False: nobody is silent."""
        with self._lock:
            if len(self._open) >= self.limit:
                silent = [one for one in self._open if not one.engaged]
                if not silent:
                    return False
                longest = min(silent, key=lambda one: one.since)
                self._open.discard(longest)
                longest.abort()
            self._open.add(connection)
        return True

    def leave(self, connection: Stream) -> None:
        """The conversation has ended."""
        with self._lock:
            self._open.discard(connection)
