"""What a delivery is: which chunks of a context cross a link and when, and what the far side makes of them.

Adding one is a file with a class, and a line in `DELIVERIES`. One kind cuts what a codec made of the whole context; the other,
`Pipelined`, cuts the context itself, so that each part is made, sent and decoded while others are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from testbed import kinds

if TYPE_CHECKING:
    from testbed.codecs.spec import CodecSpec

#: By the name that scenarios and rows have.
DELIVERIES = {
    "whole": "testbed.delivery.whole:Whole",
    "stream": "testbed.delivery.stream:Stream",
    "adaptive": "testbed.delivery.adaptive:Adaptive",
    "progressive": "testbed.delivery.progressive:Progressive",
    "meet": "testbed.delivery.meet:Meet",
}

#: What a text crosses by, and a cache where nobody says otherwise.
WHOLE = "whole"
#: Levels that are no codec: the far side computes the part from its tokens, or does without it.
TEXT, SKIP = "text", "skip"

Bytes = bytes | bytearray | memoryview


class Part(NamedTuple):
    """A part of a context: tokens, or layers, from `start` up to `stop`, or of a codec's pieces those. priority: 0 is needed
    most; level: the only one of the request's that it may be sent at, None: any.
    """

    by: Literal["tokens", "layers", "planes"]
    start: int
    stop: int
    priority: int = 0
    level: int | None = None


@dataclass(frozen=True)
class Delivery(kinds.Kind):
    """Base of all deliveries. depends_on_times: what is sent, or answered from, depends on when it arrives."""

    depends_on_times: ClassVar[bool] = False

    @property
    def codecs(self) -> tuple[CodecSpec, ...]:
        """Those that it brings itself."""
        return ()

    def codec_of(self, codec: CodecSpec) -> CodecSpec | None:
        """What names its cells where the scenario lists that codec; None: no cache crosses."""
        return codec

    def bound(self, model: str) -> Delivery:
        """The delivery that stands by itself: what its codecs refer to is written out. Raises SpecError."""
        return self

    def unfit(self, codec: str) -> str:
        """Why what this codec makes cannot cross so; empty where it can."""
        return ""

    def send(self, pieces: Iterable[Bytes]) -> Iterable[Bytes]:
        """At the edge: of the pieces as a codec makes them, the chunks that are to cross. Each is sent before the next is asked
        for; a list of them, which are all there, is handed over at once.
        """
        return list(pieces)

    def receive(self, chunks: Iterable[Bytes]) -> Iterable[Bytes]:
        """At the cloud: of the chunks as they come, the codec's bytes in their order, cut anywhere."""
        return list(chunks)


@dataclass(frozen=True)
class Pipelined(Delivery, ABC):
    """Base of those by parts, each of which is prefilled, encoded, sent and decoded while others are.

    may_end: the far side says when it has enough.
    """

    may_end: ClassVar[bool] = False

    @property
    def needs_every_part(self) -> bool:
        """Whether the far side can make nothing of a context that lacks one, or has them in another order."""
        return False

    @abstractmethod
    def parts(self, tokens: int, layers: int) -> list[Part]:
        """The parts of a context of so many tokens in a model of so many layers, in the order in which they are sent."""

    def too_many(self, tokens: int, layers: int, most: int) -> str:
        """Why a context of so many has more than `most` parts; empty where it has not."""
        parts = len(self.parts(tokens, layers))
        if parts <= most:
            return ""
        return f"{self} makes {parts} parts of {tokens} tokens, and a request has at most {most}: take a larger chunk"

    def ladder(self, codec: str) -> tuple[str, ...]:
        """The levels at which a part may be sent in a request for `codec`, the best first: codecs' texts, `TEXT`, `SKIP`."""
        return (codec,)


def cut(by: Literal["tokens", "layers"], length: int, chunk: int) -> list[Part]:
    """A length in parts of `chunk`, the last one perhaps shorter."""
    return [Part(by, start, min(start + chunk, length)) for start in range(0, length, chunk)]


def parse(text: str) -> Delivery:
    """The delivery that is written so. Raises SpecError."""
    delivery: Delivery = kinds.parse(text, DELIVERIES, "delivery")
    return delivery
