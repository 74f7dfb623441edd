"""Peers that are about to say who they are: so many at once, and none of them in another address's way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pending(Generic[T]):
    """At most so many of them, each by its address. Of more one is given up: of the address that has most, the one that has been
    at it longest, so that nobody who floods from an address of his own pushes out who asks from another.

    give_up: is told which, and sees to it that who is occupied with it comes to `leave`.
    """

    def __init__(self, most: int, give_up: Callable[[T], None]) -> None:
        self._most, self._give_up = most, give_up
        self._held: dict[T, str] = {}
        self._given_up: set[T] = set()
        self._lock, self._room = threading.Lock(), threading.Semaphore(most)

    def __len__(self) -> int:
        return len(self._held)

    def enter(self, one: T, address: str) -> None:
        """Begin with one, as soon as there is room: one is given up, or is about to leave."""
        with self._lock:
            crowd = self._longest_of_most() if len(self._held) >= self._most else None
        if crowd is not None:
            self._give_up(crowd)
        self._room.acquire()
        with self._lock:
            self._held[one] = address

    def leave(self, one: T) -> bool:
        """It is no longer pending, and is not given up any more; False: it was, or had left. May be called again."""
        with self._lock:
            held = self._held.pop(one, None) is not None
            if not held and one not in self._given_up:
                return False
            self._given_up.discard(one)
        self._room.release()
        return held

    def _longest_of_most(self) -> T:
        """With the lock held."""
        by_address = Counter(self._held.values())
        most = max(by_address.values())
        one = next(each for each, address in self._held.items() if by_address[address] == most)
        del self._held[one]
        self._given_up.add(one)
        return one
