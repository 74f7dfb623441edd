"""What the cloud keeps of each client: its answers, its reference distributions, its latest cache, its place in the queue."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from testbed.errors import EndpointError
from testbed.transport import wire

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVCache

#: Of so many clients something is kept; where one more comes, what the one has that was silent longest is dropped.
MAX_CLIENTS = 64


@dataclass
class Outcome:
    """One computed answer: what is sent back, and what the orchestrator may ask about it afterwards."""

    request: wire.Request
    answer: wire.Answer
    first: wire.FirstToken
    question_ids: list[int]
    details: dict[str, Any] = field(default_factory=dict)
    past: KVCache | None = (
        None  #: prefix and context as they arrived; held for a client's latest request only
    )
    likelihoods: dict[str, dict[str, float]] = field(default_factory=dict)
    mistaken: str = ""  #: why this was no answer to the request that it was given to

    def answers(self, request: wire.Request) -> bool:
        """Whether that request asks the same, as far as can be told without its payload."""
        unlike = {"id": 0, "same_as": 0, "replay": False}
        replace = msgspec.structs.replace
        return replace(request, **unlike) == replace(self.request, **unlike)


class Session:
    """One client's. A request is known by its client and the client's number for it."""

    def __init__(self) -> None:
        self._answered: dict[int, Outcome] = {}
        self._latest: Outcome | None = None
        self.full: Tensor | None = None  #: the full cache's next-token distributions

    def known(self, request: wire.Request) -> Outcome | None:
        """The answer to the earlier request that this one says it repeats, where it asks the same."""
        outcome = self._answered.get(request.same_as)
        return outcome if outcome is not None and outcome.answers(request) else None

    def remember(self, number: int, outcome: Outcome) -> None:
        """What became of a request."""
        self._answered[number] = outcome

    def hold(self, outcome: Outcome) -> None:
        """Keep a new answer's cache, and give up the one before."""
        if self._latest is not None:
            self._latest.past = None
        self._latest = outcome

    def forget(self) -> None:
        """Drop answers and distributions (a new example begins: none of them can come again)."""
        self._answered.clear()
        self.full = None

    def outcome(self, number: int) -> Outcome:
        """What became of a request. Raises EndpointError where nothing did."""
        outcome = self._answered.get(number)
        if outcome is None:
            raise EndpointError(f"request {number} was never answered here")
        if outcome.mistaken:
            raise EndpointError(outcome.mistaken)
        return outcome

    def past(self, outcome: Outcome) -> KVCache | None:
        """The cache that an answer was given with. Raises EndpointError where it is gone."""
        if outcome is not self._latest:
            raise EndpointError(
                "the cache of that request was given up for a later one's; ask for its outcome first"
            )
        return outcome.past


class Sessions:
    """Every client's session, and their queue: one computes at a time, and clients take turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._of: OrderedDict[str, Session] = OrderedDict()
        #: clients in the order of their turns, each with its own requests in the order in which they came
        self._waiting: OrderedDict[str, deque[object]] = OrderedDict()
        self._computing = False

    def of(self, client: str) -> Session:
        """A client's session, begun where there is none."""
        with self._changed:
            session = self._of.setdefault(client, Session())
            self._of.move_to_end(client)
            while len(self._of) > MAX_CLIENTS:
                self._of.popitem(last=False)
        return session

    @contextmanager
    def turn(self, client: str) -> Iterator[None]:
        """Wait for this client's turn, and compute. Whoever had one goes behind all clients that wait."""
        ticket = object()
        with self._changed:
            self._waiting.setdefault(client, deque()).append(ticket)
            self._changed.wait_for(lambda: not self._computing and self._next() is ticket)
            own = self._waiting.pop(client)
            own.popleft()
            if own:
                self._waiting[client] = own
            self._computing = True
        try:
            yield
        finally:
            with self._changed:
                self._computing = False
                self._changed.notify_all()

    def _next(self) -> object:
        return next(iter(self._waiting.values()))[0]
