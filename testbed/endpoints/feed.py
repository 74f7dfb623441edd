"""The chunks of a request's context at the edge: each is prefilled, encoded and handed over while others are.

One thread prefills, another takes chunk after chunk and sends it. The edge is one device: it does one thing at a time. What was
made for an earlier request is not made again, but waited for as long as it took.
"""

from __future__ import annotations

import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from testbed.delivery.delivery import SKIP, TEXT, Bytes, Part, Pipelined
from testbed.endpoints.side import Pace, wait_until
from testbed.endpoints.spans import Span
from testbed.endpoints.turns import Turns
from testbed.errors import EndpointError
from testbed.transport.wire import MAX_PARTS

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec
    from testbed.codecs.evidence import Evidence, Kept, Needs
    from testbed.models.kvcache import KVCache, KVLayer
    from testbed.models.prefill import BlockPrefill, Prefill


T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """One that is ready to be sent. level: which of the feed's `levels`; crc: where its payload has no checksum of its own."""

    part: Part
    level: int
    payload: Bytes
    crc: int | None = None


@dataclass
class Made:
    """What was made of a context so far, and in how many seconds."""

    prefill: Prefill | None = None
    steps: list[tuple[int, float]] = field(
        default_factory=list
    )  #: tokens, or layers, that were there after so long
    blocks: dict[int, KVCache] = field(default_factory=dict)  #: by the token behind each
    layers: list[KVLayer] = field(default_factory=list)
    gathered: dict[Needs, tuple[Evidence, float]] = field(default_factory=dict)
    kept: dict[str, tuple[Kept, float]] = field(default_factory=dict)  #: by level
    payloads: dict[tuple[str, Part], tuple[list[Bytes], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The context at hand, and how this edge makes parts of it.

    blocks: begins a prefill in blocks; gather: what a codec's selector goes by; knowing: a cache from that layer on with its
    rotary embedding told. stored: its prefill, if that was made beforehand, as was what is encoded where nothing of the request
    decides about it. made: for earlier requests. pace: a new one for each thread, that waits or is put forward (see `Pace`).
    """

    ids: list[int]
    begin: int  #: the first one's position
    num_layers: int
    vocabulary: int
    codecs: dict[str, Codec]  #: by level
    blocks: Callable[[], BlockPrefill]
    held: int  #: tokens before it
    gather: Callable[[Codec, Prefill, Pace], Evidence]
    knowing: Callable[[KVCache, int], KVCache]
    pace: Callable[[bool], Pace]
    stored: Prefill | None
    made: Made


class Source(ABC):
    """What a client sends of a request whose context comes in parts, and is told meanwhile.

    levels: what its chunks' numbers stand for. asks_receipts: what it sends next depends on what arrived. `stopped`: no further
    chunk is wanted; `late`: it is asked for a chunk only once the link is about to want it.
    """

    asks_receipts: ClassVar[bool] = False
    verified: ClassVar[bool] = False  #: whether the cloud says more of an answer, once it has given it
    levels: tuple[str, ...]
    stopped = False
    late = False

    @abstractmethod
    def prefill(self) -> None:
        """What the edge does for it in the calling thread."""

    @abstractmethod
    def __iter__(self) -> Iterator[Chunk]:
        """Each chunk when it is made; in the thread that sends."""

    def begin(self, at: float, delay_s: float) -> None:  # noqa: B027
        """The request began at that time (monotonic seconds), on a connection of that one-way delay."""

    def handed(self, index: int, at: float, size: int) -> None:  # noqa: B027
        """A chunk of so many bytes has been handed over, beginning at that time."""

    def arrived(self, index: int, at: float) -> None:  # noqa: B027
        """The cloud has had a chunk since that time."""

    @abstractmethod
    def stop(self) -> None:
        """No further chunk is wanted."""


class Feed(Source):
    """One request's. `spans`: what was done for it here, on the monotonic clock; `reused`: stages that were waited for."""

    def __init__(self, context: Context, delivery: Pipelined, levels: tuple[str, ...]) -> None:
        self.levels, self.parts = levels, delivery.parts(len(context.ids), context.num_layers)
        self.spans: list[Span] = []
        self.reused: set[str] = set()
        self.sent: list[str] = []  #: the chunks' levels
        self.payload_bytes = 0
        self.stored_s = 0.0  #: what encoding beforehand took
        if why := delivery.too_many(len(context.ids), context.num_layers, MAX_PARTS):
            raise EndpointError(why)
        self._context, self._by = context, self.parts[0].by
        self._length = len(context.ids) if self._by == "tokens" else context.num_layers
        self._end = context.begin + len(context.ids)  #: the position behind the context
        self._selected: set[str] = set()  #: levels whose tokens are chosen
        self._gathered: set[Needs] = set()  #: what is known to choose by
        self._made = context.made
        self._on_the_clock = True  #: of a request: a slower machine is waited for
        if context.stored is not None:
            self._made.prefill = context.stored
        self._turns, self._changed = Turns(), threading.Condition()
        self._there = self._length if context.stored is not None else 0
        self._wanted: int | None = None  #: how much has to be there for the chunk that is being made
        self.stopped = False
        self.late = self.asks_receipts or delivery.may_end

    def stop(self) -> None:
        """No further chunk is wanted."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def prefill(self) -> None:
        """Prefill the context, in the calling thread; nothing where it is stored. Each block, or layer, is there once done."""
        if self._context.stored is not None:
            return
        if self._made.prefill is not None:
            self._replay_prefill()
        elif self._by == "tokens":
            self._prefill_blocks()
        else:
            self._prefill_layers()

    def _replay_prefill(self) -> None:
        self.reused.add("prefill")
        for there, seconds in self._made.steps:
            if self.stopped:
                return
            with self._turns.turn("prefill"):
                started = time.monotonic()
                wait_until(started + seconds)
            self._grow(there, started, time.monotonic())

    def _prefill_blocks(self) -> None:
        run, pace = self._context.blocks(), self._context.pace(True)
        ends, done = sorted({part.stop for part in self.parts}), 0
        self._made.steps.clear()  # of one that was not whole
        for end in ends:
            with self._turns.turn("prefill"):
                started = pace.begin()
                self._made.blocks[end] = run.run(end)
                if end == ends[-1]:
                    self._made.prefill = run.finish()
                ended = pace.hold("prefill", end - done, self._context.held + done)
            took = pace.takes("prefill", end - done, self._context.held + done)
            done = end
            self._made.steps.append((end, ended - started if took is None else took))
            self._grow(end, started, ended)
            if self.stopped:
                return

    def _prefill_layers(self) -> None:
        pace, layers, tokens = self._context.pace(True), self._made.layers, len(self._context.ids)
        layers.clear()  # those of one that was not whole, and its steps
        self._made.steps.clear()
        self._turns.take("prefill")
        started = pace.begin()

        def on_layer(index: int, layer: KVLayer) -> None:
            nonlocal started
            ended = pace.hold("prefill", tokens, self._context.held, share=1 / self._length)
            layers.append(layer)
            took = pace.takes("prefill", tokens, self._context.held, 1 / self._length)
            self._made.steps.append((index + 1, ended - started if took is None else took))
            if index + 1 == self._length:
                return  # all is there when whoever selects finds the prefill, too
            self._turns.give()  # between two layers something can be encoded
            self._grow(index + 1, started, ended)
            self._turns.take("prefill")
            started = pace.begin()

        try:
            self._made.prefill = self._context.blocks().finish(on_layer)
            ended = time.monotonic()
        finally:
            self._turns.give()
        self._grow(self._length, started, ended)

    def _is_text(self, part: Part) -> bool:
        return part.level is not None and self.levels[part.level] == TEXT

    def _grow(self, there: int, started: float, ended: float) -> None:
        """So much is there, by a stretch of the prefill. What is waited for it is made first, so that the link has something to
        send."""
        made = (
            i
            for i, part in enumerate(self.parts)
            if part.start < there <= part.stop and not self._is_text(part)
        )
        chunk = next(made, 0)
        self.spans.append(Span("prefill", started, ended, chunk))
        with self._changed:
            self._there = there
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.stopped or self._wanted is None or self._wanted > there)

    def __iter__(self) -> Iterator[Chunk]:
        """Each chunk when it is made; in the thread that sends."""
        for index, part in enumerate(self.parts):
            level = self._choose(index)
            if self.stopped:
                return
            chunk = self._chunk(index, part, level)
            self._go_on()
            if chunk is None:
                return
            self.sent.append(self.levels[level])
            self.payload_bytes += len(chunk.payload)
            yield chunk

    def _choose(self, index: int) -> int:
        return self.parts[index].level or 0

    def _wait(self, there: int) -> bool:
        """Wait until so much is prefilled; False: nothing more is wanted."""
        with self._changed:
            self._wanted = there
            self._changed.wait_for(lambda: self.stopped or self._there >= there)
        return not self.stopped

    def _go_on(self) -> None:
        """What was waited for has been made: the prefill goes on."""
        with self._changed:
            self._wanted = None
            self._changed.notify_all()

    def _chunk(self, index: int, part: Part, level: int) -> Chunk | None:
        text = self.levels[level]
        if text == SKIP:
            return Chunk(part, level, b"", 0)
        if text == TEXT:
            from testbed.endpoints.tokens import to_bytes  # of numpy, which a feed of caches need not load

            ids = to_bytes(self._context.ids[part.start : part.stop], self._context.vocabulary)
            return Chunk(part, level, ids, zlib.crc32(ids))
        codec = self._context.codecs[text]
        if not self._wait(self._length if codec.selects else part.stop):
            return None
        (payload,) = self._encode(index, part, text, codec)
        return Chunk(part, level, payload)

    def store(self) -> None:
        """Encode beforehand, at every level that the request does not decide about. No clock runs, so nothing is waited for."""
        self._on_the_clock = False
        for number, level in enumerate(self.levels):
            codec = self._context.codecs.get(level)
            for index, part in enumerate(self.parts):
                if codec is not None and not codec.asks and part.level in (None, number):
                    self._encode(index, part, level, codec)
        self.stored_s = sum(seconds for _, seconds in self._made.gathered.values())
        self.stored_s += sum(seconds for _, seconds in self._made.kept.values())
        self.stored_s += sum(seconds for _, seconds in self._made.payloads.values())
        self.spans.clear()
        self._on_the_clock = True

    def _work(
        self, stage: str, index: int, known: float | None, work: Callable[[Pace], T]
    ) -> tuple[T, float]:
        """Does something in a turn of its own, and says how long it took; what is known is waited for."""
        with self._turns.turn(stage):
            pace = self._context.pace(self._on_the_clock)
            started = pace.begin()
            result = work(pace)
            if known is None:
                ended = pace.hold("codec")
            else:
                self.reused.add(stage)
                wait_until(started + known)
                ended = time.monotonic()
        self.spans.append(Span(stage, started, ended, index))
        return result, ended - started

    def _gather(self, index: int, codec: Codec) -> Evidence:
        """What selectors of like needs choose by, once a request for all of them."""
        made, needs = self._made, codec.needs
        if needs not in made.gathered:
            prefill = made.prefill
            assert prefill is not None
            made.gathered[needs] = self._work(
                "select", index, None, lambda pace: self._context.gather(codec, prefill, pace)
            )
        elif needs not in self._gathered and self._within(codec):
            evidence, seconds = made.gathered[needs]
            self._work("select", index, seconds, lambda _: evidence)
        self._gathered.add(needs)
        return made.gathered[needs][0]

    def _select(self, index: int, level: str, codec: Codec) -> Kept | None:
        """What a codec keeps of the whole, which is decided once a request."""
        made = self._made
        if not codec.selects:
            return None
        evidence = self._gather(index, codec)
        if level not in made.kept:
            made.kept[level] = self._work("select", index, None, lambda _: codec.select(evidence))
        elif level not in self._selected and self._within(codec):
            kept, seconds = made.kept[level]
            self._work("select", index, seconds, lambda _: kept)
        self._selected.add(level)
        return made.kept[level][0]

    def _pieces(self, codec: Codec, cache: KVCache) -> list[Bytes]:
        """What a part is sent as."""
        return [codec.encode(cache)]

    def _encode(self, index: int, part: Part, level: str, codec: Codec) -> list[Bytes]:
        made, kept = self._made, self._select(index, level, codec)
        if (level, part) not in made.payloads:
            made.payloads[level, part] = self._work(
                "encode",
                index,
                None,
                lambda _: self._pieces(codec, self._part(part, kept, codec.undoes_rope)),
            )
        elif self._within(codec):
            payload, seconds = made.payloads[level, part]
            self._work("encode", index, seconds, lambda _: payload)
        return made.payloads[level, part][0]

    def _within(self, codec: Codec) -> bool:
        """Whether what this codec does is part of the request, not done beforehand."""
        return self._context.stored is None or codec.asks

    def _computed_behind(self, part: Part) -> bool:
        """Whether a later part may be sent as text."""
        return TEXT in self.levels and any(
            later.start >= part.stop and later.level in (None, self.levels.index(TEXT))
            for later in self.parts
        )

    def _part(self, part: Part, kept: Kept | None, with_ropes: bool) -> KVCache:
        """A part of what is prefilled, of the tokens that are kept."""
        from testbed.models import kvcache

        made, begin = self._made, self._context.begin
        if kept is None and part.stop in made.blocks:
            block = made.blocks[part.stop]
            # What a window hides from whoever comes behind the context is of use only to a part that is computed behind it.
            cache = block if self._computed_behind(part) else kvcache.seen_from(block, self._end)
        elif made.prefill is None:  # layers that are there before the others
            cache = kvcache.KVCache(made.layers[part.start : part.stop], self._end)
        else:
            whole = self._context.knowing(made.prefill.cache, 0) if with_ropes else made.prefill.cache
            whole = kept.apply(whole) if kept is not None else whole
            if part.by == "layers":
                cache = kvcache.layers(whole, part.start, part.stop)
            else:
                cache = kvcache.between(whole, begin + part.start, begin + part.stop)
        first = part.start if part.by == "layers" else 0
        return self._context.knowing(cache, first) if with_ropes else cache
