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
    """One request's. `payload_bytes` is what the answer is given from; a plane's priority is its number, that of the base 0."""

    verified = True

    def __init__(self, context: Context, delivery: Progressive, levels: tuple[str, ...]) -> None:
        super().__init__(context, delivery, levels)
        self._planes = delivery.planes

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
            self.payload_bytes += len(piece) if number <= self._planes else 0
            yield Chunk(Part("planes", number, number + 1, number), 0, piece)

    def _pieces(self, codec: Codec, cache: KVCache) -> list[Bytes]:
        return [*codec.chunks(cache)]
