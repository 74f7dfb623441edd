"""A past whose layers come one after another: a pass reads what is there, and waits for a layer when its attention wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from testbed.deadline import Deadline
from testbed.errors import LateError
from testbed.models.kvcache import KVCache, KVLayer, join_layers


class ArrivingCache:
    """Stands where a model takes a `KVCache` as its past. One thread puts layers, in any order; another's pass waits for them."""

    def __init__(
        self,
        layers: int,
        length: int,
        before: KVCache | None = None,
        deadline: Deadline | None = None,
        waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """length: the next token's position. before: what stands before it, known already; each layer is joined behind that.

        deadline: when whoever waits gives up. waiting: entered by a pass that has to wait, and left when it need not any more;
        it may take as long as it likes, and holds up nobody who puts.
        """
        self.length = length
        self._before, self._waiting = before, waiting
        self._deadline = deadline or Deadline(None)
        self._held: list[KVLayer | None] = [None] * layers
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def put(self, index: int, layer: KVLayer) -> None:
        """Layer `index` is there. Raises ValueError where there is none such, or it was there before, or does not fit."""
        if not 0 <= index < len(self._held) or self._held[index] is not None:
            raise ValueError(
                f"layer {index} of a cache of {len(self._held)} layers came twice or is none of them"
            )
        if self._before is not None:
            layer = join_layers([self._before.layers[index], layer], index)
        with self._changed:
            self._held[index] = layer
            self._changed.notify_all()

    def abandon(self, error: Exception) -> None:
        """No more will come: whoever asks for a layer, now or later, is told `error`. Changes nothing once all are there."""
        with self._changed:
            if None in self._held:
                self._error = self._error or error
            self._changed.notify_all()

    @property
    def layers(self) -> Sequence[KVLayer]:
        """The layers, each of which is waited for when it is taken.

        Raises LateError past the deadline, and what the cache was abandoned with.
        """
        return _Layers(self)

    def whole(self) -> KVCache:
        """The cache when all of it is there; raises as `layers` does."""
        return KVCache(list(self.layers), self.length)

    def _taken(self, index: int) -> KVLayer:
        with self._changed:
            layer = self._there(index)
        if layer is None:
            with self._waiting(), self._changed:
                while (layer := self._there(index)) is None:
                    self._wait(index)
        return layer

    def _there(self, index: int) -> KVLayer | None:
        if self._error is not None:
            raise self._error
        return self._held[index]

    def _wait(self, index: int) -> None:
        try:
            self._changed.wait(self._deadline.left())
        except TimeoutError:
            raise LateError(
                f"layer {index} of a cache of {len(self._held)} layers did not come within {self._deadline}"
            ) from None


class _Layers(Sequence[KVLayer]):
    def __init__(self, cache: ArrivingCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache._held)

    def __getitem__(self, index: Any) -> Any:
        return self._cache._taken(range(len(self))[index])


#: What a model takes as its past.
Past = KVCache | ArrivingCache
