"""Layers whose heads hold different numbers of tokens: on the way to bytes, the heads' tokens lie one behind the other.

So quantizers and transforms see a layer of a single head, [1, all heads' tokens, head_dim], and only tokens that are there
become bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.models.kvcache import KVCache, KVLayer


def without_empty_places(cache: KVCache) -> KVCache:
    """The cache without places that are empty in every head of their layer, of which no payload tells."""
    from testbed.models.kvcache import KVCache

    layers = [
        layer if layer.counts is None else layer.slice(layer.tokens - max(layer.counts))
        for layer in cache.layers
    ]
    return KVCache(layers, cache.length)


def flatten(cache: KVCache) -> KVCache:
    """The cache with each ragged layer as one head, whose positions ascend head by head."""
    from testbed.models.kvcache import KVCache

    return KVCache(
        [layer if layer.counts is None else flat(layer, layer.positions) for layer in cache.layers],
        cache.length,
    )


def flat(layer: KVLayer, positions: Tensor) -> KVLayer:
    """A layer's tokens, head by head, as one head; `positions` [kv_heads, tokens] says which places hold one."""
    from testbed.models.kvcache import EMPTY

    held = positions != EMPTY
    return replace(
        layer, keys=layer.keys[held][None], values=layer.values[held][None], positions=positions[held][None]
    )


def restore(cache: KVCache, positions: Sequence[Tensor]) -> KVCache:
    """The inverse of `flatten`: each layer at its `positions`."""
    from testbed.models.kvcache import EMPTY, KVCache

    layers = []
    for layer, where in zip(cache.layers, positions, strict=True):
        if where.dim() == 2 and bool((where == EMPTY).any()):
            held = where != EMPTY
            keys = layer.keys.new_zeros(*where.shape, layer.keys.shape[2])
            values = layer.values.new_zeros(*where.shape, layer.values.shape[2])
            keys[held], values[held] = layer.keys[0], layer.values[0]
            layer = replace(layer, keys=keys, values=values, positions=where)
        layers.append(layer)
    return KVCache(layers, cache.length)


def flat_positions(where: Tensor) -> Tensor:
    """A layer's positions as `flatten` leaves them."""
    from testbed.models.kvcache import EMPTY

    ragged = where.dim() == 2 and bool((where == EMPTY).any())
    return where[where != EMPTY][None] if ragged else where
