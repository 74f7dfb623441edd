"""Coders where coding pays: caches with little in them, which come back as they do without a coder, bit for bit."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from testbed.codecs import registry
from testbed.codecs.codec import Codec, decode
from testbed.models.kvcache import EMPTY, KVCache, KVLayer
from tests.codecs.caches import same_cache

#: KV heads, elements of a key and of a value, tokens
SHAPES = {
    "2 × 64": (2, 64, 64, 160),
    "1 × 256": (1, 256, 256, 96),
    "3 × 64": (3, 64, 64, 137),
    "8 × 128": (8, 128, 128, 40),
    "odd": (3, 7, 5, 91),
    "latent": (1, 48, 80, 70),
    "one token": (2, 64, 64, 1),
}
QUANTIZERS = (
    *(
        {"mixed": "mixed(low=3, high=16, protect=K0.V1)", "best": "best(plan=none)"}.get(name, name)
        for name in registry.QUANTIZERS
    ),
    "int4(axis=channel, group=48)",
    "int8(group=48, symmetric=false)",
    "planes(bits=3)",
    "kivi(residual=30)",
    "cachegen(anchor=10)",
    "delta+int4",
    "delta(order=consecutive)+int8",
)
CODERS = (*registry.CODERS, "ans(tables=part)", "ans(tables=channel)")


def patterns(heads: int, dim: int, tokens: int) -> list[Tensor]:
    """[heads, tokens, dim] each: constant, constant by channel, smooth, few levels, zero but for a few, by halves, Gaussian."""
    generator = torch.Generator().manual_seed(dim)
    t, c = torch.arange(tokens)[:, None].float(), torch.arange(dim)[None].float()
    noise = torch.randn(heads, tokens, dim, generator=generator)
    rare = torch.where(torch.rand(heads, tokens, dim, generator=generator) < 0.02, noise, torch.zeros(()))
    return [
        torch.full((heads, tokens, dim), 1.5),
        (c * 0.37 - 3).expand(heads, tokens, dim),
        (torch.sin(t / 40) + torch.cos(c / 9)).expand(heads, tokens, dim),
        torch.randint(0, 3, (heads, tokens, dim), generator=generator).float() - 1,
        rare,
        torch.where(c < dim / 2, torch.zeros(()), noise),
        noise,
    ]


@functools.cache
def cache_of(name: str, dtype: torch.dtype) -> KVCache:
    """A layer of each pattern; one that keeps no token, and one whose heads keep unlike numbers."""
    heads, key_dim, value_dim, tokens = SHAPES[name]
    where = torch.arange(7, 7 + tokens)
    keys, values = patterns(heads, key_dim, tokens), patterns(heads, value_dim, tokens)[::-1]
    layers = [KVLayer(k.to(dtype), v.to(dtype), where) for k, v in zip(keys, values, strict=True)]
    uneven = torch.arange(tokens).expand(heads, -1).clone()
    uneven[-1, : tokens // 2] = EMPTY
    uneven = uneven.sort(1).values
    return KVCache([*layers, layers[0].slice(0, 0), layers[3].select(uneven)], 7 + tokens)


@functools.cache
def uncoded(text: str, name: str, dtype: torch.dtype) -> tuple[int, KVCache]:
    """How many bytes the payload has, and what it decodes to."""
    payload = Codec(text).encode(cache_of(name, dtype))
    return len(payload), decode(payload)


@pytest.mark.parametrize("quantizer, coder", [*itertools.product(QUANTIZERS, CODERS)])
def test_a_coded_cache_is_the_uncoded_one_wherever_coding_pays(quantizer: str, coder: str) -> None:
    saved, own = [], quantizer.startswith(("cachegen", "lossless", "best", "kvtc"))  # which bring a coder
    for i, name in enumerate(SHAPES):
        dtype = (torch.float16, torch.bfloat16)[(i + len(quantizer)) % 2]
        size, plain = uncoded(quantizer, name, dtype)
        payload = Codec(f"{quantizer}+{coder}").encode(cache_of(name, dtype))
        assert same_cache(decode(payload), plain), name
        assert len(payload) <= size + 16 + 10 * len(plain.layers) or own
        saved.append(size - len(payload))
    assert max(saved) > 0 or own or coder == "ans(tables=channel)"  # which may cost more than they save


@pytest.mark.parametrize("coder", ("", *(f"+{coder}" for coder in registry.CODERS)))
def test_a_layer_of_which_no_head_is_full_loses_its_empty_places_and_nothing_else(coder: str) -> None:
    layer = cache_of("3 × 64", torch.float16).layers[3]
    loose = torch.tensor([[-1, -1, 4, 9, 20], [-1, -1, -1, 0, 136], [-1, -1, 2, 3, 4]])
    for text in ("fp16", "int4", "planes"):
        codec = Codec(text + coder)
        found, tight = (
            decode(codec.encode(KVCache([layer.select(index)], 200))) for index in (loose, loose[:, 2:])
        )
        assert same_cache(found, tight)
        assert found.layers[0].counts == [3, 2, 3]
