"""Every quantizer, behind every transform, on the largest and smallest numbers that a cache can hold."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from testbed.codecs import CodecError, registry
from testbed.codecs.codec import Codec, decode
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.rope import Rope
from tests.codecs.test_every_codec import VARIANTS

HEADS, TOKENS, DIM = 2, 37, 64
INTEGERS = ("int8", "int4", "int3", "int2", "int8(symmetric=false)", "int4(symmetric=true, group=0)", "fp16")
TEXTS = (
    *(
        {"mixed": "mixed(low=2, high=8, protect=K0.V1)", "best": "best(plan=none)"}.get(name, name)
        for name in registry.QUANTIZERS
    ),
    *VARIANTS,
    *(
        f"delta({given})+{integer}"
        for given, integer in itertools.product(
            ("rope=pre", "order=consecutive, anchor=30", "rope=pre, loop=open, order=consecutive, anchor=30"),
            INTEGERS,
        )
    ),
    "delta(rope=pre, loop=open)+kvquant",
    "delta(rope=pre, loop=open)+cachegen",
    "delta(rope=pre, loop=open)+turbo",
    "delta(rope=pre, loop=open)+fp8",
)
#: Turns by whole and by half turns too, so that a pair's length, up to √2 times its larger element, lies in one element.
ROPE = Rope(tuple(math.pi / 4 / (1 + i % 5) for i in range(DIM // 2)), tuple(range(DIM // 2)), DIM // 2)


def patterns(dtype: torch.dtype) -> list[Tensor]:
    """[heads, tokens, dim] each."""
    shape, form = (HEADS, TOKENS, DIM), torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    one_large, one_channel = noise.clone(), noise.clone()
    one_large[1, 17, 5] = -form.max
    one_channel[..., 3] = form.max
    alternating = torch.full(shape, form.max, dtype=torch.float64)
    alternating[:, 1::2] *= -1
    least = form.smallest_normal * form.eps
    return [
        torch.full(shape, form.max, dtype=torch.float64),
        signs * form.max,
        alternating,
        one_large,
        one_channel,
        noise * form.max / 8,
        signs * least,
        noise * form.smallest_normal,
        torch.zeros(shape, dtype=torch.float64),
    ]


@functools.cache
def cache_of(dtype: torch.dtype) -> KVCache:
    where = torch.arange(1, 1 + TOKENS)
    made = [each.to(dtype) for each in patterns(dtype)]
    layers = [KVLayer(k, v, where, rope=ROPE) for k, v in zip(made, made[::-1], strict=True)]
    assert all(bool(layer.keys.isfinite().all()) for layer in layers)
    return KVCache(layers, 1 + TOKENS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", TEXTS)
def test_no_finite_cache_decodes_to_infinity_or_nan(text: str, dtype: torch.dtype) -> None:
    cache = cache_of(dtype)
    found = decode(Codec(text).encode(cache))
    for i, (ours, theirs) in enumerate(zip(found.layers, cache.layers, strict=True)):
        for kind, back, x in (("keys", ours.keys, theirs.keys), ("values", ours.values, theirs.values)):
            assert bool(back.isfinite().all()), (i, kind)
            # No element is farther off than its vector's length: what is decoded is of the size of what was sent. Beside
            # the largest numbers there are, those about the least normal one may be lost.
            size = float(x.double().abs().amax()) * DIM**0.5 + 300 * torch.finfo(dtype).smallest_normal
            off = float((back.double() - x.double()).abs().max())
            assert off <= 1.01 * size, (i, kind)


@pytest.mark.parametrize("text", ["delta(rope=pre)+int8", "delta(order=consecutive)+int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_of_the_largest_numbers_are_as_exact_as_those_of_small_ones(
    text: str, dtype: torch.dtype
) -> None:
    """Scaled by a power of two, a cache of normal numbers decodes to the same numbers, scaled."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(HEADS, TOKENS, DIM, generator=generator).add_(1).to(dtype)
    x[:, ::2] *= -1
    exponent = 14 if dtype == torch.float16 else 126

    def decoded(scale: int) -> KVLayer:
        layer = KVLayer(x * 2.0**scale, x * 2.0**scale, torch.arange(TOKENS), rope=ROPE)
        return decode(Codec(text).encode(KVCache([layer], TOKENS))).layers[0]

    small, large = decoded(4), decoded(exponent)
    for ours, theirs in ((large.keys, small.keys), (large.values, small.values)):
        off = ours.double() / 2.0**exponent - theirs.double() / 2.0**4
        assert float(off.abs().max()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "text", [text for text in TEXTS if text.partition("(")[0] not in ("fp16", "lossless")]
)
def test_nan_and_infinity_are_refused_by_the_layer_that_holds_them(text: str, value: float) -> None:
    cache = cache_of(torch.float16)
    layer = KVLayer(
        cache.layers[8].keys.clone(), cache.layers[8].values.clone(), torch.arange(TOKENS), rope=ROPE
    )
    layer.keys[1, 4, 2] = value
    plain = replace(layer, keys=cache.layers[8].keys)
    with pytest.raises(CodecError, match="keys of layer 1"):
        Codec(text).encode(KVCache([plain, layer], TOKENS))
