"""Caches of every shape that the codecs must carry."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from testbed.models.kvcache import KVCache, KVLayer

#: name -> (KV heads, head_dim, value_dim, window) of each layer, tokens, first position, format
SHAPES: dict[str, tuple[list[tuple[int, int, int, int | None]], int, int, torch.dtype]] = {
    "grouped": ([(3, 64, 64, None)] * 4, 96, 57, torch.float16),
    "multi-head bf16": ([(8, 80, 80, None)] * 2, 40, 0, torch.bfloat16),
    "multi-query": ([(1, 256, 256, None)] * 3, 33, 5, torch.float16),
    "odd dimensions": ([(3, 7, 5, None)] * 2, 13, 1, torch.float16),
    "one element": ([(1, 1, 1, None)], 1, 0, torch.float16),
    "sliding layers": ([(1, 64, 64, 24), (1, 64, 64, 24), (1, 64, 64, None)] * 2, 50, 9, torch.bfloat16),
    "latent": ([(1, 64, 128, None)] * 2, 20, 0, torch.float16),
    "one token": ([(2, 64, 64, None)] * 30, 1, 100, torch.float16),
    "no tokens": ([(2, 64, 64, None)] * 3, 0, 4, torch.float16),
}


def random_layer(
    heads: int,
    head_dim: int,
    value_dim: int,
    positions: Tensor,
    dtype: torch.dtype,
    generator: torch.Generator,
    window: int | None = None,
) -> KVLayer:
    """Gaussian keys and values with channels far from zero, as real keys have."""

    def values(dimensions: int) -> Tensor:
        offset = 3 * torch.randn(heads, 1, dimensions, generator=generator)
        noise = torch.randn(heads, positions.shape[-1], dimensions, generator=generator)
        return (noise + offset).to(dtype)

    return KVLayer(values(head_dim), values(value_dim), positions, window)


def make_cache(name: str, seed: int = 0) -> KVCache:
    """A cache of a shape in `SHAPES`."""
    layers, tokens, first, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(first, first + tokens)
    made = [random_layer(h, d, v, positions, dtype, generator, window) for h, d, v, window in layers]
    return KVCache(made, first + tokens)


def ragged_cache(seed: int = 0) -> KVCache:
    """Layers that hold different tokens, and one whose heads do."""
    generator = torch.Generator().manual_seed(seed)
    lists = [
        torch.arange(10, 200),
        torch.arange(10, 200)[torch.randperm(190, generator=generator)[:50].sort().values],
        torch.stack([torch.randperm(200, generator=generator)[:40].sort().values for _ in range(3)]),
        torch.tensor([10, 199]),
    ]
    return KVCache([random_layer(3, 64, 64, where, torch.float16, generator) for where in lists], 200)


def uneven_cache(seed: int = 0) -> KVCache:
    """Layers whose heads hold different numbers of tokens, none at all among them, and one whose heads hold equally many."""
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(3, 64, 64, torch.arange(10, 200), torch.float16, generator)
    uneven = [[-1, -1, -1, 5], [-1, -1, -1, -1], [0, 1, 30, 189]]
    return KVCache([layer.select(torch.tensor(uneven)), layer, layer.select(torch.tensor(uneven[::-1]))], 200)


def unlike_cache() -> KVCache:
    """Layers of every shape in `SHAPES`, in fp16."""
    layers = [layer for name in SHAPES for layer in make_cache(name).to(dtype=torch.float16).layers[:3]]
    return KVCache(layers, 200)


_CACHES = {
    "alike": lambda: make_cache("grouped"),
    "unlike": unlike_cache,
    "ragged": ragged_cache,
    "uneven": uneven_cache,
    "no tokens": lambda: make_cache("no tokens"),
}
#: Every kind of layer in both formats, layers that are alike and layers that are not, and none of any tokens: for `cache_of`.
CACHES = ("alike", "unlike", "unlike, in bf16", "ragged", "no tokens")


@functools.cache
def cache_of(name: str) -> KVCache:
    """One of `CACHES`, or uneven heads; of all tests, which leave it as it is."""
    name, _, in_bf16 = name.partition(", ")
    made = _CACHES[name]()
    return made.to(dtype=torch.bfloat16) if in_bf16 else made


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal format, shape and bits (NaN equals itself)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def same_cache(a: KVCache, b: KVCache) -> bool:
    """Equal bit for bit, positions, windows and length included."""
    return (
        a.length == b.length
        and len(a.layers) == len(b.layers)
        and all(
            same_bits(x.keys, y.keys)
            and same_bits(x.values, y.values)
            and torch.equal(x.positions, y.positions)
            and x.window == y.window
            for x, y in zip(a.layers, b.layers, strict=True)
        )
    )
