"""A model's KV cache as plain tensors: what codecs take apart, endpoints send, and a model attends to.

Nothing here depends on an architecture or on transformers. The module imports without torch, so that code
that only describes caches stays light; torch is needed by whoever holds tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.models.live import LayerShape
    from testbed.models.rope import Rope

#: Bytes of an element in the formats that caches are held in (fp16, bf16).
ELEMENT_BYTES = 2

#: The position of a place that holds no token.
EMPTY = -1


@dataclass
class KVLayer:
    """Keys and values of one layer, with the absolute position of each.

    A layer may hold fewer tokens than the model has seen (a selector dropped some, or a sliding window
    passed). Layers may hold different tokens, and so may the heads of a layer. A head that holds fewer than
    another begins with empty places: position `EMPTY`, zeros as key and value, seen by no query, sent to nobody.
    """

    keys: Tensor  #: [kv_heads, tokens, head_dim], rotary position already applied
    values: Tensor  #: [kv_heads, tokens, value_dim]; value_dim is head_dim in nearly all models
    #: int64 [tokens], or [kv_heads, tokens] where heads differ: absolute, ascending behind a head's empty places
    positions: Tensor
    #: Sliding-window length: a query at position q sees the keys at q - window < p <= q; None: all p <= q.
    window: int | None = None
    #: How the keys were turned to their positions, for codecs that turn them back; None where that is not known.
    rope: Rope | None = None

    @property
    def tokens(self) -> int:
        """How many tokens each head of this layer holds; the fullest, where heads hold different numbers."""
        return int(self.keys.shape[1])

    @property
    def counts(self) -> list[int] | None:
        """How many tokens each head holds, where the numbers differ; else None."""
        if self.positions.dim() == 1 or not self.tokens:
            return None
        empty = (self.positions == EMPTY).sum(1)
        return None if not bool(empty.any()) else (self.tokens - empty).tolist()

    @property
    def kv_heads(self) -> int:
        """How many key/value heads this layer has."""
        return int(self.keys.shape[0])

    @property
    def head_dim(self) -> int:
        """Elements of one key."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Size of keys and values in a two-byte format, whatever they are held in here."""
        counts = self.counts
        places = self.kv_heads * self.tokens if counts is None else sum(counts)
        return places * (self.keys.shape[2] + self.values.shape[2]) * ELEMENT_BYTES

    def select(self, kept: Tensor) -> KVLayer:
        """The tokens at the indices `kept` ([n], or [kv_heads, n] where heads differ), which must ascend.

        Indices count this layer's tokens, not positions. A head that keeps fewer than another begins with `EMPTY`.
        Raises ValueError where they do not ascend or lie outside.
        """
        if kept.dim() not in (1, 2) or (kept.dim() == 2 and kept.shape[0] != self.kv_heads):
            raise ValueError(f"kept has shape {tuple(kept.shape)}; expected [n] or [{self.kv_heads}, n]")
        kept = kept.to(self.keys.device)
        least = EMPTY if kept.dim() == 2 else 0
        if kept.numel() and (int(kept.min()) < least or int(kept.max()) >= self.tokens):
            raise ValueError(f"kept has indices outside 0..{self.tokens - 1}")
        if not _ascends(kept):
            raise ValueError("kept does not ascend")
        if kept.dim() == 1:
            return replace(
                self,
                keys=self.keys[:, kept],
                values=self.values[:, kept],
                positions=self.positions[..., kept],
            )
        return self._gathered(kept)

    def _gathered(self, places: Tensor) -> KVLayer:
        """Each head's places in this order, [kv_heads, n]; `EMPTY` ones hold zeros."""
        taken, empty = places.clamp_min(0), (places == EMPTY)[..., None]
        keys = self.keys.gather(1, taken[..., None].expand(-1, -1, self.keys.shape[2]))
        values = self.values.gather(1, taken[..., None].expand(-1, -1, self.values.shape[2]))
        positions = self.positions.expand(self.kv_heads, self.tokens).gather(1, taken)
        if bool(empty.any()):
            keys, values = keys.masked_fill(empty, 0), values.masked_fill(empty, 0)
            positions = positions.masked_fill(empty[..., 0], EMPTY)
        return replace(self, keys=keys, values=values, positions=positions)

    def empty_first(self) -> KVLayer:
        """With each head's empty places before its tokens, whose order stays; as few of them as the fullest head allows."""
        if (counts := self.counts) is None:
            return self
        held = self.positions != EMPTY
        places = held.to(self.positions.dtype).argsort(dim=1, stable=True)
        return self._gathered(places[:, self.tokens - max(counts) :])

    def slice(self, start: int, stop: int | None = None) -> KVLayer:
        """The tokens from index `start` up to `stop`, as views; negative numbers count from the end."""
        part = slice(start, stop)
        return replace(
            self, keys=self.keys[:, part], values=self.values[:, part], positions=self.positions[..., part]
        )

    def between(self, start: int, stop: int | None = None) -> KVLayer:
        """The tokens at the absolute positions `start` up to `stop` (None: all from there), as views.

        Where heads hold different ones of these, their places are gathered into a copy.
        """
        first = (self.positions < start).sum(-1)
        last = first.new_tensor(self.tokens) if stop is None else (self.positions < stop).sum(-1)
        last = last.maximum(first)
        if first.dim() == 0 or bool((first == first[0]).all() & (last == last[0]).all()):
            return self.slice(int(first.flatten()[0]), int(last.flatten()[0]))
        import torch

        most = int((last - first).max())
        places = last[:, None] + torch.arange(-most, 0, device=first.device)
        return self._gathered(places.masked_fill(places < first[:, None], EMPTY))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KVLayer:
        """On another device, or with keys and values in another format; shares what need not change."""
        return replace(
            self,
            keys=self.keys.to(device=device, dtype=dtype),
            values=self.values.to(device=device, dtype=dtype),
            positions=self.positions.to(device=device),
        )

    def clone(self) -> KVLayer:
        """A copy that shares no memory."""
        return replace(
            self, keys=self.keys.clone(), values=self.values.clone(), positions=self.positions.clone()
        )


@dataclass
class KVCache:
    """The KV cache of a stretch of tokens: one `KVLayer` a layer."""

    layers: list[KVLayer]
    length: int  #: tokens the model has seen up to here: the next token's position

    @property
    def nbytes(self) -> int:
        """Size in a two-byte format: elements × 2."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys live."""
        return self.layers[0].keys.device

    @property
    def dtype(self) -> torch.dtype:
        """The format of the first layer's keys."""
        return self.layers[0].keys.dtype

    def tokens(self, layer: int) -> int:
        """How many tokens each head of `layer` holds (the fullest, where they differ)."""
        return self.layers[layer].tokens

    def select(self, kept: Sequence[Tensor]) -> KVCache:
        """Each layer's tokens at its indices in `kept` (see `KVLayer.select`); `length` stays."""
        if len(kept) != len(self.layers):
            raise ValueError(f"kept has {len(kept)} entries for {len(self.layers)} layers")
        return KVCache([layer.select(k) for layer, k in zip(self.layers, kept, strict=True)], self.length)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """On another device or in another format; shares what need not change."""
        return KVCache([layer.to(device, dtype) for layer in self.layers], self.length)

    def clone(self) -> KVCache:
        """A copy that shares no memory."""
        return KVCache([layer.clone() for layer in self.layers], self.length)


def _ascends(numbers: Tensor) -> bool:
    """Whether numbers ascend along the last dimension, behind those that are `EMPTY`."""
    before, after = numbers[..., :-1], numbers[..., 1:]
    return bool(((after > before) | ((after == EMPTY) & (before == EMPTY))).all())


def join(*caches: KVCache) -> KVCache:
    """One cache behind the other, as if they were one stretch.

    Each must end no later than the next begins. Heads that differ in one part make the joined positions per
    head. Raises ValueError where the parts do not fit together.
    """
    if not caches:
        raise ValueError("join() needs at least one cache")
    if len({len(cache.layers) for cache in caches}) > 1:
        raise ValueError(f"caches of {[len(cache.layers) for cache in caches]} layers cannot be joined")
    if len(caches) == 1:
        return caches[0]
    held = zip(*(cache.layers for cache in caches), strict=True)
    return KVCache([join_layers(parts, index) for index, parts in enumerate(held)], caches[-1].length)


def join_layers(parts: Sequence[KVLayer], index: int) -> KVLayer:
    """`join` for the parts of one layer, which is the `index`th where an error names it."""
    import torch

    shapes = {(part.kv_heads, part.head_dim, part.values.shape[2], part.window) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"layer {index}: parts differ in heads, dimensions or window: {sorted(shapes, key=str)}"
        )
    per_head = any(part.positions.dim() == 2 for part in parts)
    positions = [part.positions.expand(part.kv_heads, -1) if per_head else part.positions for part in parts]
    keys = torch.cat([part.keys for part in parts], 1)
    values = torch.cat([part.values for part in parts], 1)
    stretch = replace(parts[0], keys=keys, values=values, positions=torch.cat(positions, -1))
    joined = stretch.empty_first()
    if not _ascends(joined.positions):
        raise ValueError(f"layer {index}: the parts' positions overlap or are out of order")
    return joined


def stack(*caches: KVCache) -> KVCache:
    """The layers of one cache above those of the next: what `layers` took apart. Raises ValueError where lengths differ."""
    lengths = sorted({cache.length for cache in caches})
    if len(lengths) != 1:
        raise ValueError(f"stack() takes caches of one length, not {lengths}")
    return KVCache([layer for cache in caches for layer in cache.layers], lengths[0])


def nothing(shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> KVCache:
    """A cache without a token, of a model of these shapes."""
    import torch

    empty = []
    for shape in shapes:
        sizes = ((shape.kv_heads, 0, width) for width in (shape.head_dim, shape.value_dim))
        keys, values = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
        empty.append(KVLayer(keys, values, torch.empty(0, dtype=torch.int64, device=device), shape.window))
    return KVCache(empty, 0)


def layers(cache: KVCache, start: int, stop: int) -> KVCache:
    """The layers `start` up to `stop`, sharing memory. Raises ValueError where there are none such."""
    if not 0 <= start < stop <= len(cache.layers):
        raise ValueError(f"layers {start} to {stop} of a cache of {len(cache.layers)} layers")
    return KVCache(cache.layers[start:stop], cache.length)


def between(cache: KVCache, start: int, stop: int) -> KVCache:
    """The tokens at the absolute positions `start` up to `stop` in every layer (see `KVLayer.between`).

    What `join` makes one cache again. Raises ValueError where the positions are none of this cache.
    """
    if not 0 <= start <= stop <= cache.length:
        raise ValueError(f"positions {start} to {stop} of a cache that ends at {cache.length}")
    return KVCache([layer.between(start, stop) for layer in cache.layers], stop)


def seen_from(cache: KVCache, position: int) -> KVCache:
    """Without what no query at the absolute position `position` or behind it sees, since it lies before a layer's window."""
    cut = [
        layer if layer.window is None else layer.between(max(0, position - layer.window + 1))
        for layer in cache.layers
    ]
    return KVCache(cut, cache.length)
