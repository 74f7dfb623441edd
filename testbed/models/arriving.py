"""A past whose layers come one after another: a pass reads what is there, and asks for a layer when its attention wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from testbed.errors import LateError
from testbed.models.kvcache import KVCache, KVLayer, join_layers


class ArrivingCache:
    """Stands where a model takes a `KVCache` as its past, and asks for a layer when a pass wants one that is not there."""

    def __init__(
        self,
        layers: int,
        length: int,
        before: KVCache | None = None,
        waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """length: the next token's position. before: what stands before it, known already; each layer is joined behind that.

        waiting: entered by a pass that wants a layer, and to put one or more; it may take as long as it likes.
        """
        self.length = length
        self._before, self._waiting = before, waiting
        self._held: list[KVLayer | None] = [None] * layers

    def put(self, index: int, layer: KVLayer) -> None:
        """Layer `index` is there. Raises ValueError where there is none such, or it was there before, or does not fit."""
        if not 0 <= index < len(self._held) or self._held[index] is not None:
            raise ValueError(
                f"layer {index} of a cache of {len(self._held)} layers came twice or is none of them"
            )
        if self._before is not None:
            layer = join_layers([self._before.layers[index], layer], index)
        self._held[index] = layer

    @property
    def layers(self) -> Sequence[KVLayer]:
        """The layers, each of which is asked for when it is taken. Raises LateError where nothing comes."""
        return _Layers(self)

    def whole(self) -> KVCache:
        """The cache when all of it is there; raises as `layers` does."""
        return KVCache(list(self.layers), self.length)

    def _taken(self, index: int) -> KVLayer:
        while (layer := self._held[index]) is None:
            missing = self._held.count(None)
            with self._waiting():
                pass
            if self._held.count(None) == missing:
                raise LateError(f"layer {index} of a cache of {len(self._held)} layers has not come")
        return layer


class _Layers(Sequence[KVLayer]):
    def __init__(self, cache: ArrivingCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache._held)

    def __getitem__(self, index: Any) -> Any:
        return self._cache._taken(range(len(self))[index])


#: What a model takes as its past.
Past = KVCache | ArrivingCache
