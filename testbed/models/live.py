"""The cache that a model writes while it runs, held so that a decoded token costs no copy of what is there.

It stands where transformers expects a cache: attention modules call `update`. Every layer is held at full
length, sliding-window layers too; the masks of `attention` decide who sees what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.models.arriving import ArrivingCache, Past
from testbed.models.kvcache import KVCache, KVLayer


@dataclass(frozen=True)
class LayerShape:
    """What a layer's attention looks like, as the model told the backend."""

    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None = None  #: [q_heads], see `attention.with_sinks`


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of that format holds of a tensor."""
    if dtype == tensor.dtype:
        return tensor
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max > limit:
        # A value past the format's range would become infinite and poison every later softmax. In float32: the limit itself
        # is no number of every format.
        tensor = tensor.float().clamp(-limit, limit)
    return tensor.to(dtype)


class LiveCache:
    """Keys and values in the model's own format, behind a past or from nothing.

    What is written is rounded to `cache_dtype` first, so that a cache taken out in that format is exactly
    what attention read. `capacity` tokens can be written without a copy; more make it grow.
    """

    is_compileable = False

    def __init__(
        self,
        past: Past | None,
        capacity: int,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device,
        layers: int,
        sources: Mapping[int, int] | None = None,
    ) -> None:
        """sources: of layers that attend to another one's keys and values, which one that is."""
        self.sources = sources or {}
        self.dtype, self.cache_dtype, self.device = dtype, cache_dtype, device
        self.length = past.length if past is not None else 0
        self.start = self.length  #: absolute position of the first token written here
        self.written = [0] * layers
        #: Told when a layer's keys and values are there, before attention reads them.
        self.on_layer: Callable[[int], None] | None = None
        self._past = [0] * layers
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._past_positions: list[Tensor | None] = [None] * layers
        self._to_come: dict[
            int, ArrivingCache
        ] = {}  #: by layer, where its past is to be had when it is written behind
        if isinstance(past, ArrivingCache):
            self._to_come = dict.fromkeys(range(layers), past)
        elif past is not None:
            for index in range(layers):
                self._load(index, past)

    def _load(self, index: int, past: Past) -> None:
        """Copy a layer of the past in. Layers with equal positions share one tensor, so that they share masks too."""
        layer = past.layers[index]
        self._keys[index] = self._grown(layer.keys[None], layer.tokens + self._capacity)
        self._values[index] = self._grown(layer.values[None], layer.tokens + self._capacity)
        positions = layer.positions.cpu()
        if layer.tokens and int(positions.max()) >= past.length:
            raise ValueError(f"layer {index} holds a token at or past the cache's length {past.length}")
        known = (p for p in self._past_positions if p is not None)
        twin = next((p for p in known if p is positions or torch.equal(p, positions)), positions)
        self._past[index], self._past_positions[index] = layer.tokens, twin

    def _grown(self, tensor: Tensor, capacity: int) -> Tensor:
        _, heads, tokens, width = tensor.shape
        larger = torch.empty(1, heads, capacity, width, dtype=self.dtype, device=self.device)
        larger[:, :, :tokens].copy_(tensor)
        return larger

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The next token's position, as transformers asks for it."""
        return self.length

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [1, kv_heads, n, d]; returns all that it holds now.

        Raises what the layer's past raises.
        """
        if layer_idx in self._to_come:
            self._load(layer_idx, self._to_come[layer_idx])
            del self._to_come[layer_idx]
        count = self._past[layer_idx] + self.written[layer_idx]
        total = count + keys.shape[2]
        held = []
        for store, new in ((self._keys, keys), (self._values, values)):
            buffer = store[layer_idx]
            if buffer is None:
                buffer = new.new_empty(1, new.shape[1], max(self._capacity, total), new.shape[3])
            elif total > buffer.shape[2]:
                buffer = self._grown(buffer[:, :, :count], total + total // 2)
            buffer[:, :, count:total].copy_(rounded(new, self.cache_dtype))
            store[layer_idx] = buffer
            held.append(buffer[:, :, :total])
        self.written[layer_idx] += keys.shape[2]
        if self.on_layer is not None:
            self.on_layer(layer_idx)
        return held[0], held[1]

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens written here, so that others can stand in their place."""
        if not 0 <= tokens <= min(self.written):
            raise ValueError(f"{tokens} tokens to keep of {min(self.written)}")
        self.written = [tokens] * len(self.written)
        self.length = self.start + tokens

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values so far, [1, kv_heads, tokens, d], as views."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise ValueError(f"layer {layer} holds nothing yet")
        total = self._past[layer] + self.written[layer]
        return keys[:, :, :total], values[:, :, :total]

    def first_not_finite(self, past: bool, last: int | None = None) -> int | None:
        """The first layer whose keys or values hold NaN or infinity, among those of the past or those written here.

        last: of those written here, look at so many of the last ones.
        """
        flags = []
        for index, start in enumerate(self._past):
            end = start + self.written[index]
            span = slice(0, start) if past else slice(start if last is None else end - last, end)
            parts = [
                held[:, :, span] for held in (self._keys[index], self._values[index]) if held is not None
            ]
            finite = [part.isfinite().all() for part in parts]
            flags.append(
                torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool).to(self.device)
            )
        known = torch.stack(flags).tolist()  # one wait for the device
        return next((index for index, finite in enumerate(known) if not finite), None)

    def past_positions(self, layer: int) -> Tensor | None:
        """Positions of the layer's tokens that were there from the start; None where there were none."""
        return self._past_positions[layer]

    def export(self, shapes: list[LayerShape], last: int | None = None) -> KVCache:
        """What was written since the start, in the cache format, sharing no memory with this.

        A sliding-window layer gives up what no later query can see: all but the last window - 1 tokens. With `last`, it is the
        last tokens written, so many of them in every layer.
        """
        positions: dict[int, Tensor] = {}
        layers = [self.export_layer(index, shape, last) for index, shape in enumerate(shapes)]
        for layer in layers:  # equal ones are one
            layer.positions = positions.setdefault(layer.tokens, layer.positions)
        return KVCache(layers, self.length)

    def export_layer(self, index: int, shape: LayerShape, last: int | None = None) -> KVLayer:
        """One layer of `export`."""
        count = self.written[index]
        kept = count if shape.window is None else min(count, shape.window - 1)
        kept = kept if last is None else last
        end = self._past[index] + count
        tensors = []
        for store, width in ((self._keys, shape.head_dim), (self._values, shape.value_dim)):
            buffer = store[index]
            if buffer is None:
                buffer = torch.empty(1, shape.kv_heads, 0, width, device=self.device)
            part = buffer[0, :, end - kept : end]
            tensors.append(torch.empty(part.shape, dtype=self.cache_dtype, device=self.device).copy_(part))
        positions = torch.arange(self.start + count - kept, self.start + count, device=self.device)
        return KVLayer(tensors[0], tensors[1], positions, shape.window)


class LivePass:
    """One forward pass over a `LiveCache`: the positions it attends to, and the queries or sums of attention it keeps."""

    def __init__(self, cache: LiveCache, new: int, queries: int | None = 0, attention: bool = False) -> None:
        self._cache = cache
        self.tokens = new  #: that it still goes over
        self._keep = new if queries is None else min(queries, new)
        self._positions: dict[int | None, Tensor] = {}
        self._masks: dict[Any, Any] = {}
        self.queries: dict[int, Tensor] = {}
        self.attention: dict[int, Tensor] | None = {} if attention else None
        #: scaling, softcap, window and sinks by layer, of those without a cache of their own, too
        self.told: dict[int, tuple[float, float | None, int | None, Tensor | None]] = {}

    def positions(self, layer: int) -> Tensor:
        """Absolute positions of the layer's keys, the past's and those written up to this pass's end."""
        past = self._cache.past_positions(self._cache.sources.get(layer, layer))
        name = None if past is None else id(past)
        if name not in self._positions:
            tail = torch.arange(self._cache.start, self._cache.length + self.tokens)
            if past is not None and past.shape[-1]:
                tail = torch.cat([past, tail.expand(*past.shape[:-1], -1)], -1)
            self._positions[name] = tail
        return self._positions[name]

    def drop(self, tokens: int) -> None:
        """The pass goes on without so many of its last tokens; it must keep nothing of them."""
        self.tokens -= tokens
        self._positions.clear()
        self._masks.clear()

    def masks(self) -> dict[Any, Any]:
        """Masks made in this pass; keyed by `positions` objects, which live as long as these."""
        return self._masks

    def observe(
        self,
        layer: int,
        queries: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> None:
        """Note what attention used; keeps the last queries asked for, [q_heads, n, head_dim], of layers with a cache."""
        self.told[layer] = (scaling, softcap, window, sinks)
        if self._keep and layer not in self._cache.sources:
            first = queries.shape[1] - self._keep
            # All of them are kept as they are; of a part a copy, so that the rest is freed.
            self.queries[layer] = queries[:, first:].clone() if first else queries

    def sums(self, layer: int, kv_heads: int) -> Tensor | None:
        """Zeros for the layer's keys, to be added to, where the pass is to keep `attention` and the layer has a cache."""
        if self.attention is None or layer in self._cache.sources:
            return None
        tokens = self.positions(layer).shape[-1]
        return self.attention.setdefault(layer, torch.zeros(kv_heads, tokens, device=self._cache.device))
