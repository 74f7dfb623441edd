"""What every registered method keeps to, on caches of every shape; a new one is met here without being named."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch

from testbed.codecs import registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Kept
from testbed.codecs.layout import expected_bytes
from testbed.codecs.spec import parse
from testbed.errors import PayloadError
from tests.codecs import caches
from tests.codecs.caches import CACHES, cache_of, same_cache

_QUANTIZERS = [
    {"mixed": "mixed(protect=K0.V1)", "best": "best(plan=none)"}.get(name, name)
    for name in registry.QUANTIZERS
]
CODECS = (
    *_QUANTIZERS,
    *(f"{quantizer}+{coder}" for quantizer in ("int4", "int8", "fp16") for coder in registry.CODERS),
    *(f"{transform}+int4" for transform in registry.TRANSFORMS),
    "delta(loop=open, order=consecutive)+int2+ans",
    "planes+zstd",
)
#: What their parameters change.
VARIANTS = (
    "int8(group=32)",
    "int8(symmetric=false)",
    "int8(axis=channel, group=0)",
    "int4(group=0)",
    "int4(group=24)",
    "int4(symmetric=true)",
    "int4(symmetric=true, group=0)",
    "int4(axis=channel)",
    "int3(symmetric=true, axis=channel)",
    "int2(symmetric=true)",
    "int2(axis=channel)",
    "fp8(scale=head)",
    "kivi(residual=5, group=8)",
    "kivi(bits=4, residual=0)",
    "normsep(bits=2)",
    "normsep(bits=3, group=16, symmetric=true)",
    "turbo(bits=1)",
    "turbo(bits=2, seed=7)",
    "turbo(outliers=0)",
    "turbo(bits=3, outliers=0.4, extra=3)",
    "turbo(bits=8, outliers=0.5)",
    "kvquant(bits=1, outliers=0)",
    "kvquant(bits=4, outliers=0.1, levels=normal)",
    "mixed(protect=none)",
    "mixed(low=2, high=16, protect=K0.V1)",
    "mixed(protect=K0.V1, scale=token)",
    "planes(bits=4, group=0)",
    "planes(bits=2)",
    "cachegen(level=1, anchor=10)",
    "cachegen(level=4)",
    "lossless(coder=ans)",
    "think(keep=0.3, of=int4)",
    "lowrank(keep=0.2, of=fp16)",
    "kvtc(bits=0.8, sinks=1, last=3)",
    "gear(bits=4, rank=0)",
    "gear(outliers=0.5, rank=100)",
    "kvtc(bits=8, sinks=0, last=0)",
)
EVERY = [*itertools.product((*CODECS, *VARIANTS), (*CACHES, "uneven", "uneven, in bf16"))]


@functools.cache
def payload_of(text: str, name: str) -> bytes:
    return bytes(Codec(text).encode(cache_of(name)))


@pytest.mark.parametrize("text, name", EVERY)
def test_shapes_positions_and_format_come_back_and_the_same_bytes_each_time(text: str, name: str) -> None:
    cache, payload = cache_of(name), payload_of(text, name)
    decoded = decode(payload)
    assert (decoded.length, len(decoded.layers)) == (cache.length, len(cache.layers))
    for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert ours.window == theirs.window
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert bool(torch.isfinite(a).all())
    torch.rand(50_000)  # memory that held something else
    assert bytes(Codec(text).encode(cache)) == payload
    assert same_cache(decode(payload), decoded)


@pytest.mark.parametrize("text", (*CODECS, *VARIANTS))
def test_encoding_leaves_the_cache_as_it_was_and_takes_the_bytes_that_were_expected(text: str) -> None:
    cache = caches.make_cache("grouped")
    size = len(Codec(text).encode(cache))
    assert same_cache(cache, caches.make_cache("grouped"))
    expected = expected_bytes(parse(text), [(3, 64, 64, None)] * 4, 96)
    coded = Codec(text).coder is not None or "turbo" in text
    assert size <= expected + 400 if coded else abs(size - expected) <= 100


#: bits: of an element, for 32 layers of 8 heads, 128 dimensions and 4096 tokens, by what each method says that it sends.
BITS = {
    "fp16": 16,
    "int8": 8 + 16 / 128,
    "int8(symmetric=false)": 8 + 32 / 128,
    "int4": 4 + 32 / 32,
    "int4(axis=channel)": 4 + 32 / 32,
    "int4(symmetric=true)": 4 + 16 / 32,
    "int4(group=48)": 4 + 3 * 32 / 128,
    "int3": 3 + 32 / 32,
    "int2": 2 + 32 / 32,
    "fp8": 8 + 16 / 128,
    "fp8(scale=head)": 8,
    "kivi": (2 + 32 / 32) * 3968 / 4096 + 16 * 128 / 4096,  # the last 128 tokens as they are
    "normsep": 4 + 16 / 128 + 32 / 4096,  # a norm for each vector, a scale and zero point for each channel
    "turbo": 4 + 0.25 + 2 * 16 / 128 + 1 / 4096,  # a quarter of the channels have a bit more, and a norm
    "turbo(outliers=0)": 4 + 16 / 128,
    # a hundredth of each vector apart, 32 bits each, and s and z: channels over 4096 tokens, tokens over 1024 channels
    "kvquant": 3 + (32 * 41 / 4096 + 32 / 4096 + 32 * 10 / 1024 + 32 / 1024) / 2,
    "mixed(protect=none)": 4 + 32 / 32,
    "mixed(protect=0-15)": (8 + 16 / 128 + 4 + 32 / 32) / 2,
    "planes": 8 + 32 / 32,
    "think": (16 * 77 / 128 + 1 / 4096 + 16) / 2,  # a bit a channel of keys to say which are sent
    "think(keep=0.5, of=int4)": (5 / 2 + 1 / 4096 + 5) / 2,
    "lowrank": (4 + 32 / 32) / 2 + 16 * (1 + 64) / 4096,  # its own mean and 64 components a head
    # keys: 41 outliers at each end of a channel; values: one at each end of a token; factors of rank 4
    "gear": 2 + (82 * 32 + 32) / 4096 / 2 + (2 * 32 + 32) / 128 / 2 + 16 * 4 * (4096 + 128) / (4096 * 128),
    "kvtc": (16 * 132 + 2 * 3964) / 4096 + 16 * (1 + 128) / 4096,  # 132 tokens whole
    # of 32 layers, 10 of keys and 2 of values have 32 bins and 5 bits; a scale for each token over all heads
    "cachegen": 4 + 12 / 64 + 16 / 1024,
}


@pytest.mark.parametrize("text", BITS)
def test_a_method_takes_the_bits_an_element_that_it_says(text: str) -> None:
    layers, tokens = [(8, 128, 128, None)] * 32, 4096
    found = 8 * expected_bytes(parse(text), layers, tokens) / (32 * 2 * 8 * 128 * tokens)
    assert found == pytest.approx(BITS[text], rel=1e-3)


@pytest.mark.parametrize("text", CODECS)
def test_kept_tokens_are_those_that_were_asked_for(text: str) -> None:
    cache = cache_of("alike")
    kept = Kept(tuple(torch.arange(i, 96, 3 + i) for i in range(4)), 96)
    decoded = decode(Codec(text).encode(cache, kept))
    for ours, theirs, index in zip(decoded.layers, cache.layers, kept.layers, strict=True):
        assert index is not None
        assert torch.equal(ours.positions, theirs.positions[index])
        assert ours.keys.shape == (3, len(index), 64)


@pytest.mark.parametrize("text", CODECS)
def test_truncated_and_flipped_payloads_raise_what_callers_expect(text: str) -> None:
    payload, chance = payload_of(text, "uneven"), random.Random(0)
    for length in {*chance.sample(range(len(payload)), 40), 0, len(payload) - 1}:
        with pytest.raises(PayloadError):
            decode(payload[:length])
    for bit in chance.sample(range(8 * len(payload)), 40):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            decode(flipped)


def test_a_payload_of_another_version_is_refused_by_its_number() -> None:
    payload = bytearray(payload_of("int4", "alike"))
    payload[4:6] = (2).to_bytes(2, "little")
    with pytest.raises(PayloadError, match="payload version 2; this program reads version 3"):
        decode(payload)
