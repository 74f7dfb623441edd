"""Transforms: make a cache cheaper to code before it is quantized (differences between tokens, rotations …)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from testbed.codecs import CodecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from testbed.codecs.steps import Quantizer, Transform
    from testbed.models.kvcache import KVCache

#: Differences and turns may be larger than what they are made of, and a coarse quantizer's sums of them larger still. A cache
#: within `_ROOM` of its format's largest number is transformed at 2^-`_HALVINGS` of its size, of which a byte tells that no
#: transform's own bytes begin with.
_ROOM, _HALVINGS = 8, 6
_SCALED = bytes([_HALVINGS])


def encode(transform: Transform, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
    """`transform.encode` of a cache in 16 bits, scaled where the format has no room for what that makes.

    Raises CodecError for NaN and infinity, which would spread from the token that holds them.
    """
    import torch

    largest = 0.0
    for i, layer in enumerate(cache.layers):
        for kind, x in (("keys", layer.keys), ("values", layer.values)):
            extremes = [abs(float(extreme)) for extreme in x.aminmax()] if x.numel() else []
            if not all(map(math.isfinite, extremes)):
                raise CodecError(f"{transform.name}: {kind} of layer {i} hold NaN or infinity")
            largest = max(largest, *extremes, 0.0)
    if largest <= torch.finfo(cache.dtype).max / _ROOM:
        return transform.encode(cache, quantizer)
    changed, side = transform.encode(_times(cache, 2.0**-_HALVINGS), quantizer)
    return changed, _SCALED + side


def decode(transform: Transform, cache: KVCache, side: bytes, dtype: torch.dtype) -> KVCache:
    """The inverse: from float32 to `dtype`, whose largest number stands for what is beyond it. Raises as `transform.decode`."""
    import torch

    restored = transform.decode(cache, side.removeprefix(_SCALED))
    if side.startswith(_SCALED):
        restored = _times(restored, 2.0**_HALVINGS)
    limit = torch.finfo(dtype).max

    def saturated(x: Tensor) -> Tensor:
        return x.clamp(-limit, limit).to(dtype)

    layers = [
        replace(layer, keys=saturated(layer.keys), values=saturated(layer.values))
        for layer in restored.layers
    ]
    return replace(restored, layers=layers)


def _times(cache: KVCache, factor: float) -> KVCache:
    layers = [
        replace(layer, keys=layer.keys * factor, values=layer.values * factor) for layer in cache.layers
    ]
    return replace(cache, layers=layers)
