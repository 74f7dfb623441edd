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
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache
from tests.codecs.caches import SHAPES, make_cache, ragged_cache, same_cache, uneven_cache

_QUANTIZERS = [{"mixed": "mixed(protect=K0.V1)"}.get(name, name) for name in registry.QUANTIZERS]
CODECS = (
    *_QUANTIZERS,
    *(f"{quantizer}+{coder}" for quantizer in ("int4", "int8", "fp16") for coder in registry.CODERS),
    *(f"{transform}+int4" for transform in registry.TRANSFORMS),
    "delta(loop=open, order=consecutive)+int2+ans",
    "planes+zstd",
)
#: Each shape in its own format, and these in the other one of the two that caches have.
TURNED = [f"{name}, in the other format" for name in ("grouped", "sliding layers", "uneven")]
EVERY = [*itertools.product(CODECS, [*SHAPES, "ragged", "uneven", *TURNED])]


@functools.cache
def cache_of(name: str) -> KVCache:
    name, _, other = name.partition(", ")
    made = {"ragged": ragged_cache, "uneven": uneven_cache}
    cache = made[name]() if name in made else make_cache(name)
    if other:
        return cache.to(dtype={torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[cache.dtype])
    return cache


@functools.cache
def payload_of(text: str, name: str) -> bytes:
    return bytes(Codec(text).encode(cache_of(name)))


@pytest.mark.parametrize("text, name", EVERY)
def test_shapes_positions_and_format_come_back(text: str, name: str) -> None:
    cache, decoded = cache_of(name), decode(payload_of(text, name))
    assert (decoded.length, len(decoded.layers)) == (cache.length, len(cache.layers))
    for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert ours.window == theirs.window
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert bool(torch.isfinite(a).all())


@pytest.mark.parametrize("text, name", EVERY)
def test_the_same_cache_gives_the_same_bytes(text: str, name: str) -> None:
    payload = payload_of(text, name)
    torch.rand(50_000)  # memory that held something else
    assert bytes(Codec(text).encode(cache_of(name))) == payload
    assert same_cache(decode(payload), decode(payload))


@pytest.mark.parametrize("text", CODECS)
def test_kept_tokens_are_those_that_were_asked_for(text: str) -> None:
    cache = cache_of("grouped")
    kept = Kept(tuple(torch.arange(i, 96, 3 + i) for i in range(4)), 96)
    decoded = decode(Codec(text).encode(cache, kept))
    for ours, theirs, index in zip(decoded.layers, cache.layers, kept.layers, strict=True):
        assert index is not None
        assert torch.equal(ours.positions, theirs.positions[index])
        assert ours.keys.shape == (3, len(index), 64)


@pytest.mark.parametrize("text, name", [*itertools.product(CODECS, ["odd dimensions", "uneven"])])
def test_truncated_and_flipped_payloads_raise_what_callers_expect(text: str, name: str) -> None:
    payload, chance = payload_of(text, name), random.Random(0)
    for length in {*chance.sample(range(len(payload)), 40), 0, len(payload) - 1}:
        with pytest.raises(PayloadError):
            decode(payload[:length])
    for bit in chance.sample(range(8 * len(payload)), 40):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            decode(flipped)


def test_a_payload_of_another_version_is_refused_by_its_number() -> None:
    payload = bytearray(payload_of("int4", "grouped"))
    payload[4:6] = (2).to_bytes(2, "little")
    with pytest.raises(PayloadError, match="payload version 2; this program reads version 3"):
        decode(payload)
