"""A context at the cloud, rebuilt from what comes: whole, or part by part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from testbed.delivery.delivery import SKIP, TEXT, Bytes
from testbed.delivery.progressive import MOST_PLANES
from testbed.endpoints.arrivals import Arrived
from testbed.endpoints.side import InferenceSide, Pass, Prefix, held
from testbed.endpoints.tokens import from_bytes
from testbed.errors import PayloadError, WireError
from testbed.models.arriving import ArrivingCache
from testbed.models.kvcache import EMPTY
from testbed.transport import wire

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.codec import Decoder
    from testbed.models.kvcache import KVCache


@dataclass
class Rebuilt:
    """Prefix and context as the model's past."""

    past: KVCache | ArrivingCache | None
    tokens: int  #: of the context's text; 0 where a cache came
    #: positions and window of each layer of the cache that came
    kept: list[tuple[Tensor, int | None]] = field(default_factory=list)
    left_out: int = 0  #: context tokens of which nothing is there
    planes: int = 0  #: bit planes of each value that are; 0: it came in none
    missing: str = ""  #: why these are not all of them; empty where they are

    @property
    def held(self) -> int:
        """Tokens that a layer of the past holds."""
        return self.past.length if isinstance(self.past, ArrivingCache) else held(self.past)

    def whole(self) -> KVCache | None:
        """The past, of which all is there."""
        return self.past.whole() if isinstance(self.past, ArrivingCache) else self.past

    @property
    def tokens_kept(self) -> int:
        """Context tokens kept, as the mean over the layers that a selector may prune (all, where none has full attention)."""
        if not self.kept:
            return self.tokens
        layers = [positions for positions, window in self.kept if window is None] or [
            positions for positions, _ in self.kept
        ]
        held = [int((p != EMPTY).sum()) / (len(p) if p.dim() == 2 else 1) for p in layers]
        return round(sum(held) / len(held))


def prefilled(side: InferenceSide, prefix: Prefix, payload: Sequence[Bytes]) -> Rebuilt:
    """From the context's text. Raises WireError."""
    try:
        text = b"".join(payload).decode()
    except UnicodeDecodeError as error:
        raise WireError("the request's context is not UTF-8 text") from error
    ids = side.model.tokenize(text)
    context = side.model.prefill(ids, prefix.cache).cache
    return Rebuilt(side.behind(prefix, context), len(ids))


def decoded(side: InferenceSide, prefix: Prefix, payload: Sequence[Bytes]) -> Rebuilt:
    """From a codec's bytes. Raises PayloadError."""
    return rebuilt_from(side, prefix, _decode(side, payload))


def _decoder(side: InferenceSide, layers: slice = slice(None)) -> Decoder:
    from testbed.codecs.cache_format import CacheShape
    from testbed.codecs.codec import Decoder

    shapes = tuple((s.kv_heads, s.head_dim, s.value_dim, s.window) for s in side.model.shapes[layers])
    return Decoder(side.model.device, CacheShape(shapes, side.model.max_positions))


def _decode(side: InferenceSide, payload: Sequence[Bytes], layers: slice = slice(None)) -> KVCache:
    decoder = _decoder(side, layers)
    for piece in payload:
        decoder.feed(piece)
    return decoder.finish()


def rebuilt_from(side: InferenceSide, prefix: Prefix, cache: KVCache, left_out: int = 0) -> Rebuilt:
    """From a cache of what is there of the context."""
    kept = [(layer.positions, layer.window) for layer in cache.layers]
    return Rebuilt(side.behind(prefix, cache), 0, kept, left_out)


def _check_within(cache: KVCache, start: int, stop: int, chunk: wire.Chunk) -> None:
    for layer in cache.layers:
        held = layer.positions[layer.positions != EMPTY]
        if held.numel() and not start <= int(held.min()) <= int(held.max()) < stop:
            raise PayloadError(f"chunk {chunk.index} holds other tokens than it says")


class Parts:
    """Parts of tokens, in whatever order they come: each is decoded, or computed behind those that are there."""

    def __init__(self, side: InferenceSide, prefix: Prefix, request: wire.Request) -> None:
        self._side, self._prefix, self._request = side, prefix, request
        self._begin = prefix.cache.length if prefix.cache is not None else 0
        self._there: dict[int, KVCache] = {}  # by their first token
        self._ends: dict[int, int] = {}

    def stage(self, arrived: Arrived) -> Literal["decode", "prefill"]:
        """What `take` will do."""
        return "prefill" if self._request.levels[arrived.chunk.level] == TEXT else "decode"

    def next(self, waiting: deque[Arrived]) -> list[Arrived]:
        """Of those that wait what is to be taken next: the first one, and behind a text the texts that follow on each other."""
        run = [waiting.popleft()]
        while (
            waiting
            and self.stage(run[-1]) == self.stage(waiting[0]) == "prefill"
            and run[-1].chunk.start < run[-1].chunk.stop == waiting[0].chunk.start < waiting[0].chunk.stop
        ):
            run.append(waiting.popleft())
        return run

    def take(self, run: Sequence[Arrived], made: Pass) -> None:
        """What `next` said; `made`: told what pass that took. Raises PayloadError, WireError."""
        chunk, last = run[0].chunk, run[-1].chunk
        level = self._request.levels[chunk.level]
        if last.stop > self._request.tokens:
            raise WireError(f"chunk {last.index} is of tokens that the context does not have")
        if level == SKIP:
            return
        start, stop = self._begin + chunk.start, self._begin + last.stop
        if level == TEXT:
            cache = self._computed(run, start, made)
        else:
            cache = _decode(self._side, [run[0].payload])
            _check_within(cache, start, stop, chunk)
        self.put(chunk.start, last.stop, cache)

    def _computed(self, run: Sequence[Arrived], start: int, made: Pass) -> KVCache:
        """Texts in one pass over the model's weights, behind what is there of the tokens before them."""
        model, ids = self._side.model, list[int]()
        for arrived in run:
            length = arrived.chunk.stop - arrived.chunk.start
            ids += from_bytes(arrived.payload, length, model.vocabulary)
        before = self._joined([begin for begin in self._there if begin < run[0].chunk.start], start)
        made.tokens, made.past = len(ids), held(self._prefix.cache, before)
        return model.prefill(ids, self._past(before, start)).cache

    def put(self, start: int, stop: int, cache: KVCache) -> None:
        """The cache of a part is there. Raises WireError where some of it was: what is left out could not be counted."""
        if start >= stop or any(start < end and begin < stop for begin, end in self._ends.items()):
            raise WireError(
                f"a part of tokens {start} to {stop} of a context, where those have come, or none"
            )
        self._there[start], self._ends[start] = cache, stop

    def finish(self) -> Rebuilt:
        """All that has come. Raises PayloadError."""
        end = self._begin + self._request.tokens
        whole = self._joined(list(self._there), end)
        left_out = self._request.tokens - sum(stop - start for start, stop in self._ends.items())
        if whole is None:  # all was left out
            return Rebuilt(self._past(None, end), 0, [], left_out)
        return rebuilt_from(self._side, self._prefix, whole, left_out)

    def _past(self, before: KVCache | None, position: int) -> KVCache:
        """What the token at that position sees: the prefix and, of the context, what is there. What is not leaves its place."""
        from testbed.models.kvcache import KVCache, nothing

        past = self._side.behind(self._prefix, before)
        if past is None:
            model = self._side.model
            past = nothing(model.shapes, model.cache_dtype, model.device)
        return KVCache(past.layers, position)

    def _joined(self, starts: list[int], length: int) -> KVCache | None:
        from testbed.models.kvcache import KVCache

        if not starts:
            return None
        try:
            joined = self._side.model.join(*(self._there[start] for start in sorted(starts)))
        except ValueError as error:
            raise PayloadError(f"the parts of a context do not fit together: {error}") from None
        return KVCache(joined.layers, length)


class Layers:
    """Parts of layers, the first ones first. `rebuilt.past` is theirs, and the rest is waited for as that is read.

    waiting: entered where a layer is wanted that is not there, and to `take` it.
    """

    def __init__(
        self,
        side: InferenceSide,
        prefix: Prefix,
        request: wire.Request,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._side, self._request = side, request
        self._begin = prefix.cache.length if prefix.cache is not None else 0
        self._end, self._there = self._begin + request.tokens, 0
        self._cache = ArrivingCache(side.model.num_layers, self._end, prefix.cache, waiting=waiting)
        self.rebuilt = Rebuilt(self._cache, 0)

    def take(self, arrived: Arrived) -> None:
        """The next layers. Raises PayloadError, WireError."""
        chunk = arrived.chunk
        if chunk.start != self._there or not chunk.start < chunk.stop <= self._side.model.num_layers:
            raise WireError(f"chunk {chunk.index} is of other layers than come next")
        cache = _decode(self._side, [arrived.payload], slice(chunk.start, chunk.stop))
        _check_within(cache, self._begin, self._end, chunk)
        for index, layer in enumerate(cache.layers, chunk.start):
            self._cache.put(index, layer)
            self.rebuilt.kept.append((layer.positions, layer.window))
        self._there = chunk.stop

    def there(self) -> float:
        """The share of the layers that are there."""
        return self._there / self._side.model.num_layers


class Planes:
    """What bit planes are read with and the planes behind it, in whatever order they come. `arrived`: those before which none is
    missing.
    """

    def __init__(self, side: InferenceSide, prefix: Prefix, request: wire.Request) -> None:
        self._side, self._prefix, self._request = side, prefix, request
        self._begin = prefix.cache.length if prefix.cache is not None else 0
        self._decoder = _decoder(side)
        self._decoded = 0
        self._early: dict[int, Arrived] = {}
        self.arrived: list[Arrived] = []

    def take(self, arrived: Arrived) -> None:
        """What has come now. Raises WireError."""
        chunk = arrived.chunk
        known = chunk.start < len(self.arrived) or chunk.start in self._early
        if known or chunk.start > MOST_PLANES or chunk.stop != chunk.start + 1:
            raise WireError(f"chunk {chunk.index} is a plane that there is not, or that has come")
        self._early[chunk.start] = arrived
        while len(self.arrived) in self._early:
            self.arrived.append(self._early.pop(len(self.arrived)))

    def rebuilt(self, count: int) -> Rebuilt:
        """From the first so many chunks, which are no fewer than before. Raises PayloadError."""
        for arrived in self.arrived[self._decoded : count]:
            self._decoder.feed(arrived.payload)
        self._decoded = count
        ready = self._decoder.ready()
        end = self._begin + self._request.tokens
        _check_within(ready.cache, self._begin, end, self.arrived[count - 1].chunk)
        rebuilt = rebuilt_from(self._side, self._prefix, ready.cache)
        rebuilt.planes, rebuilt.missing = ready.planes, ready.missing
        return rebuilt
