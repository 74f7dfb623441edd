"""The chunks of a context in bit planes, at the edge: what they are read with, then plane by plane, all made at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from testbed.delivery.delivery import Bytes, Part
from testbed.delivery.progressive import Progressive
from testbed.endpoints.feed import Chunk, Context, Feed

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec
    from testbed.models.kvcache import KVCache


class PlaneFeed(Feed):
    """One request's. Of all chunks what planes are read with is needed most, then the planes that the answer is given from."""

    verified = True

    def __init__(self, context: Context, delivery: Progressive, levels: tuple[str, ...]) -> None:
        super().__init__(context, delivery, levels)
        self._planes, self._lengths = delivery.planes, list[int]()

    def __iter__(self) -> Iterator[Chunk]:
        (part,), (level,) = self.parts, self.levels
        if not self._wait(self._length):
            return
        pieces = self._encode(0, part, level, self._context.codecs[level])
        self._go_on()
        for number, piece in enumerate(pieces):
            if self.stopped:
                return
            self.sent.append(level)
            self._lengths.append(len(piece))
            priority = (number > 0) + (number > self._planes)
            yield Chunk(Part("planes", number, number + 1, priority), 0, piece)

    def _pieces(self, codec: Codec, cache: KVCache) -> list[Bytes]:
        return [*codec.chunks(cache)]

    def answered(self, planes: int) -> None:
        """The answer was given from so many planes: `payload_bytes` is what they came to."""
        self.payload_bytes = sum(self._lengths[: planes + 1])
