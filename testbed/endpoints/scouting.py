"""The edge's part of a scout's request: its text crosses at once, and behind it the choice, as late as it is made.

What is chosen, and in how many seconds, is found beforehand with nothing beside it, and waited for here: edge and cloud are two
machines, and where one host stands for both, computing at the same time would make each slower than it is.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator, Sequence

from testbed.delivery.delivery import Bytes, Part
from testbed.endpoints.choice import LEVELS
from testbed.endpoints.feed import Chunk, Source
from testbed.endpoints.side import wait_until
from testbed.endpoints.spans import Span

#: The chunk that the edge's stages work for.
_CHOICE = 1


class Scouting(Source):
    """One request's. pieces: text and choice as they cross; stages: seconds of each that the choice takes, in order."""

    levels = LEVELS

    def __init__(self, pieces: Sequence[Bytes], tokens: int, stages: dict[str, float]) -> None:
        self.spans: list[Span] = []
        self._pieces, self._part, self._stages = pieces, Part("tokens", 0, tokens), stages
        self._made = threading.Event()

    def prefill(self) -> None:
        """Wait for as long as the choice takes; in the calling thread."""
        at = time.monotonic()
        for stage, seconds in self._stages.items():
            wait_until(at + seconds)
            ended = time.monotonic()
            self.spans.append(Span(stage, at, ended, _CHOICE))
            at = ended
        self._made.set()

    def __iter__(self) -> Iterator[Chunk]:
        """The text at once, the choice when it is made."""
        for level, payload in enumerate(self._pieces):
            if level == _CHOICE:
                self._made.wait()
            if self.stopped:
                return
            yield Chunk(self._part, level, payload, zlib.crc32(payload))

    def stop(self) -> None:
        self.stopped = True
        self._made.set()
