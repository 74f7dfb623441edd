"""The cloud's clients: which connections it takes, whose turn it is, and what it keeps of each: answers, distributions, cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import structs

from testbed.endpoints.protocol import Outcome
from testbed.endpoints.turns import Turns
from testbed.errors import EndpointError
from testbed.transport import wire
from testbed.transport.transport import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.cache_format import Positions
    from testbed.models.kvcache import KVCache
    from testbed.models.trail import Trail

#: Of so many clients something is kept; where one more comes, what the one has that was silent longest is dropped.
MAX_CLIENTS = 64


@dataclass
class Served:
    """One computed answer: what is sent back, and what the orchestrator may ask about it afterwards."""

    request: wire.Request
    answer: wire.Answer
    first: wire.FirstToken
    question_ids: list[int]
    details: dict[str, Any] = field(default_factory=dict)
    #: prefix and context as they arrived; held for a client's latest request only
    past: KVCache | None = None
    trail: Trail | None = None  #: how it was decoded; held as long
    answer_ids: list[int] = field(default_factory=list)
    #: of a scout, the context's tokens and which of them were chosen
    scouted: tuple[list[int], Positions] | None = None
    mistaken: str = ""  #: why this was no answer to the request that it was given to

    def answers(self, request: wire.Request) -> bool:
        """Whether that request asks the same, as far as can be told without its payload."""
        return _asks(request) == _asks(self.request)

    def alike(self, gold: str, selector: str) -> tuple[object, ...]:
        """What its outcome follows from: equal for answers that were made of the same bytes, on whichever link these came."""
        answer = (*self.answer_ids, self.answer.left_out, self.answer.planes)
        return _asks(self.request), tuple(self.details.items()), answer, gold, selector


def _asks(request: wire.Request) -> wire.Request:
    return structs.replace(request, id=0, same_as=0, replay=False)


class Session:
    """One client's. A request is known by its client and the client's number for it."""

    def __init__(self) -> None:
        self._answered: dict[int, Served] = {}
        self._latest: Served | None = None
        self.full: Tensor | None = None  #: the full cache's next-token distributions
        self.outcomes: dict[tuple[object, ...], Outcome] = {}  #: by what they follow from (`Served.alike`)
        self.overlaps: dict[tuple[str, ...], float] = {}  #: of scouts' choices, by what was chosen of and how

    def known(self, request: wire.Request) -> Served | None:
        """The answer to the earlier request that this one says it repeats, where it asks the same."""
        served = self._answered.get(request.same_as)
        return served if served is not None and served.answers(request) else None

    def remember(self, number: int, served: Served) -> None:
        """What became of a request."""
        self._answered[number] = served

    def hold(self, served: Served) -> None:
        """Keep a new answer's cache, and give up the one before."""
        if self._latest is not None:
            self._latest.past = self._latest.trail = None
        self._latest = served

    def forget(self) -> None:
        """Drop answers and distributions (a new example begins: none of them can come again)."""
        self._answered.clear()
        self.overlaps.clear()
        self.compare(None)

    def compare(self, full: Tensor | None) -> None:
        """Outcomes are compared with these distributions from now on, or with none."""
        self.full = full
        self.outcomes.clear()

    def served(self, number: int) -> Served:
        """What became of a request. Raises EndpointError where nothing did."""
        served = self._answered.get(number)
        if served is None:
            raise EndpointError(f"request {number} was never answered here")
        if served.mistaken:
            raise EndpointError(served.mistaken)
        return served

    def past(self, served: Served) -> KVCache | None:
        """The cache that an answer was given with. Raises EndpointError where it is gone."""
        if served is not self._latest:
            raise EndpointError(
                "the cache of that request was given up for a later one's; ask for its outcome first"
            )
        return served.past


class Sessions(Turns):
    """Every client's session, and their queue: one computes at a time, and clients take turns."""

    def __init__(self) -> None:
        super().__init__()
        self._of: OrderedDict[str, Session] = OrderedDict()
        self._kept = threading.Lock()

    def of(self, client: str) -> Session:
        """A client's session, begun where there is none."""
        with self._kept:
            session = self._of.setdefault(client, Session())
            self._of.move_to_end(client)
            while len(self._of) > MAX_CLIENTS:
                self._of.popitem(last=False)
        return session


class Admission:
    """The connections that are open, of which there is room for so many; where one more comes, the one that has been silent
    longest goes. A peer is silent until a request's header has come from it.
    """

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
