"""A process that serves links, from inside: orders to it, one JSON message each (``apply``, ``hurry``, ``counters``,
``under_way``, ``share``, ``remove`` for a ``link``; ``stop``), and its punctuality. From outside: `serving`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
from typing import Any, Protocol

from testbed.programs import end_sleeps_exactly, schedule_in_real_time

LARGEST = 1 << 18  # bytes of a message
_FILES = 4  # descriptors that may come with one
_PRIORITY = 2  # just above the probers' (prober.py), which must not hold up the link they measure


def take_orders() -> tuple[Control, dict[str, dict[str, Any]]]:
    """What such a process is started with, in the file whose descriptor is its only argument: who orders it, and its links."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        orders = json.loads(file.read())
    gc.disable()  # nothing here forms cycles, and a collection takes longer than a packet may wait
    return Control(socket.socket(fileno=orders["control"]), orders["listening"]), orders["links"]


def be_punctual() -> None:
    """Real-time scheduling where permitted, else a better nice value, else nothing; and exact timers."""
    if not schedule_in_real_time(_PRIORITY):
        with contextlib.suppress(OSError):
            os.nice(-10)
    end_sleeps_exactly()


class Orders(Protocol):
    """What is ordered about: links, by name."""

    def apply(
        self, link: str, conditions: dict[str, dict[str, Any]], files: list[int], fresh: bool = False
    ) -> None: ...
    def hurry(self, link: str) -> None: ...
    def under_way(self, link: str) -> int: ...
    def counters(self, link: str) -> dict[str, dict[str, float]]: ...
    def share(self, link: str, scheduler: str) -> None: ...
    def remove(self, link: str) -> bool: ...


class Control:
    """Either over one socket pair, whose other end's closing ends the relay (as does the parent's death), or over a listening
    socket."""

    def __init__(self, sock: socket.socket, listening: bool) -> None:
        self._listener = sock if listening else None
        self._connections = [] if listening else [sock]
        self._parent = None if listening else os.getppid()
        self.stopped = False
        self.files = [sock.fileno()]

    def serve(self, ready: list[int], relay: Orders) -> None:
        """Does what the sockets among *ready* say."""
        if self._parent is not None and os.getppid() != self._parent:
            self.stopped = True
        if self._listener is not None and self._listener.fileno() in ready:
            with contextlib.suppress(OSError):
                connection = self._listener.accept()[0]
                connection.settimeout(1)
                self._connections.append(connection)
        for connection in [c for c in self._connections if c.fileno() in ready]:
            try:
                message, files, _, _ = socket.recv_fds(connection, LARGEST, _FILES)
                if not message:
                    raise ConnectionError
                connection.send(json.dumps(self._answer(json.loads(message), files, relay)).encode())
            except (OSError, ValueError, LookupError, TypeError):
                connection.close()
                self._connections.remove(connection)
                self.stopped |= self._listener is None
        self.files = [s.fileno() for s in (self._listener, *self._connections) if s is not None]

    def _answer(self, order: dict[str, Any], files: list[int], relay: Orders) -> dict[str, Any]:
        if order["do"] == "apply":
            relay.apply(order["link"], order["conditions"], files, bool(order.get("fresh")))
            return {}
        if order["do"] == "hurry":
            relay.hurry(order["link"])
            return {}
        if order["do"] == "counters":
            return dict(relay.counters(order["link"]))
        if order["do"] == "under_way":
            return {"packets": relay.under_way(order["link"])}
        if order["do"] == "share":
            relay.share(order["link"], order["scheduler"])
            return {}
        if order["do"] == "remove":
            self.stopped |= not relay.remove(order["link"])
            return {}
        self.stopped |= order["do"] == "stop"
        return {}
