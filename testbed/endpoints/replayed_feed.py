"""A context in parts at an edge without a model: each part is there as late as making it took, and sent while others are."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from testbed.codecs.evidence import Needs
from testbed.delivery.delivery import Bytes, Pipelined, parse
from testbed.endpoints.feed import Chunk, Context, Feed, Made
from testbed.endpoints.protocol import Ware
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


class ReplayedFeed(Feed):
    """One request's. It is made in the thread of the device (`make`), and sent in another once the link is its own (`grant`).

    handed: told when all of it is on its way, but for little.
    """

    def __init__(self, ware: Ware, pieces: Sequence[Bytes], handed: Callable[[], None]) -> None:
        about, delivery = ware.parts, parse(ware.delivery)
        assert about is not None and isinstance(delivery, Pipelined)
        stored: Any = None if about.prefill else object()
        times = zip(pieces, about.encode_s, strict=True)
        parts = delivery.parts(about.tokens, about.layers)
        made = Made(
            prefill=cast(Any, object()),
            steps=list(about.prefill),
            gathered={_NEEDS: (cast(Any, None), 0.0)},  # in what selecting took
            kept={about.level: (cast(Any, None), ware.select_s)},
            payloads={
                (about.level, part): ([piece], seconds)
                for part, (piece, seconds) in zip(parts, times, strict=True)
            },
        )
        codec: Any = _Known(about.whole, about.asks)
        context = Context(
            ids=[0] * about.tokens,
            begin=0,
            num_layers=about.layers,
            vocabulary=1,
            codecs={about.level: codec},
            blocks=_never,
            held=0,
            gather=_never,
            knowing=_never,
            pace=lambda waits: Pace(waits=waits),
            stored=stored,
            made=made,
        )
        super().__init__(context, delivery, (about.level,))
        self.late = True  # what is handed over is on its way, so that the next request can have the link
        self._handed, self._granted = handed, threading.Event()
        self._ready: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()

    def make(self) -> None:
        """Have each part, as late as it takes; returns when the device is free again."""
        try:
            for chunk in super().__iter__():
                self._ready.put(chunk)
        finally:
            self._ready.put(None)

    def grant(self) -> None:
        """The link is this request's."""
        self._granted.set()

    def stop(self) -> None:
        super().stop()
        self._granted.set()

    def __iter__(self) -> Iterator[Chunk]:
        first = self._ready.get()
        ready = time.monotonic()
        self._granted.wait()
        self.spans.append(Span("link_queue", ready, time.monotonic()))
        while first is not None and not self.stopped:
            yield first
            first = self._ready.get()
        self._handed()
