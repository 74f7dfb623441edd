"""A context in parts at an edge without a model: each part is there as late as making it took, and sent while others are."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from testbed.codecs.evidence import Needs
from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import Bytes, Pipelined, parse
from testbed.endpoints.choosing import AdaptiveFeed, Outlook
from testbed.endpoints.experience import Experience
from testbed.endpoints.feed import Chunk, Context, Feed, Made
from testbed.endpoints.protocol import Parts, Ware
from testbed.endpoints.side import Pace
from testbed.endpoints.spans import Span

_NEEDS = Needs()


@dataclass(frozen=True)
class _Known:
    """Of a codec, what decides when its parts can be made."""

    selects: bool
    asks: bool
    undoes_rope: bool = False
    needs: Needs = _NEEDS


def _never(*_: Any) -> NoReturn:
    raise AssertionError("what was made beforehand is not made again")


class _Granted(Feed):
    """Sent once the link is its own (`grant`). handed: told when all of it is on its way, but for little."""

    handed_over: Callable[[], None]
    granted: threading.Event

    def make(self) -> None:
        """Have each part, as late as it takes; returns when the device is free again."""

    def grant(self) -> None:
        """The link is this request's."""
        self.granted.set()

    def stop(self) -> None:
        super().stop()
        self.granted.set()

    def waited(self) -> None:
        """Wait for the link."""
        ready = time.monotonic()
        self.granted.wait()
        self.spans.append(Span("link_queue", ready, time.monotonic()))


class ReplayedFeed(_Granted):
    """One request's. It is made in the thread of the device (`make`), and sent in another."""

    def __init__(self, ware: Ware, pieces: Sequence[Bytes], handed: Callable[[], None]) -> None:
        about, delivery = ware.parts, parse(ware.delivery)
        assert about is not None and isinstance(delivery, Pipelined)
        self.handed_over, self.granted = handed, threading.Event()
        context = _context(ware, about, delivery, pieces)
        super().__init__(context, delivery, (about.level,))
        self.late = True  # what is handed over is on its way, so that the next request can have the link
        self._ready: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()

    def make(self) -> None:
        try:
            for chunk in super().__iter__():
                self._ready.put(chunk)
        finally:
            self._ready.put(None)

    def __iter__(self) -> Iterator[Chunk]:
        first = self._ready.get()
        self.waited()
        while first is not None and not self.stopped:
            yield first
            first = self._ready.get()
        self.handed_over()


class ReplayedChoice(_Granted, AdaptiveFeed):
    """One request's, of whose parts every level is stored: which is sent is chosen as the link has room for it. came_at: from
    when its deadline counts, monotonic seconds; link: its name.
    """

    def __init__(
        self,
        ware: Ware,
        pieces: Sequence[Bytes],
        handed: Callable[[], None],
        came_at: float,
        experience: Experience,
        link: str,
    ) -> None:
        about, delivery = ware.parts, parse(ware.delivery)
        assert about is not None and isinstance(delivery, Adaptive)
        self.handed_over, self.granted = handed, threading.Event()
        context = _context(ware, about, delivery, pieces)
        super().__init__(context, delivery, Outlook((), 0.0, experience, link))
        self._came_at = came_at

    def begin(self, at: float, delay_s: float) -> None:
        super().begin(self._came_at, delay_s)

    def __iter__(self) -> Iterator[Chunk]:
        self.waited()
        if not self.stopped:
            yield from super().__iter__()
        self.handed_over()


def _context(ware: Ware, about: Parts, delivery: Pipelined, pieces: Sequence[Bytes]) -> Context:
    """The context that was made: its parts' payloads at each level, and what making them took."""
    parts = delivery.parts(about.tokens, about.layers)
    levels = about.choices or (about.level,)
    keys = [(level, part) for level in levels for part in parts]
    times = about.encode_s or (0.0,) * len(keys)
    known: Any = _Known(about.whole, about.asks)
    made = Made(
        prefill=cast(Any, object()),
        steps=list(about.prefill),
        payloads={key: ([piece], seconds) for key, piece, seconds in zip(keys, pieces, times, strict=True)},
    )
    if not about.choices:
        made.gathered = {_NEEDS: (cast(Any, None), 0.0)}  # in what selecting took
        made.kept = {about.level: (cast(Any, None), ware.select_s)}
    return Context(
        ids=[0] * about.tokens,
        begin=0,
        num_layers=about.layers,
        vocabulary=1,
        codecs=dict.fromkeys(levels, known),
        blocks=_never,
        held=0,
        gather=_never,
        knowing=_never,
        pace=lambda waits: Pace(waits=waits),
        stored=None if about.prefill else cast(Any, object()),
        made=made,
    )
