"""Coders and differences between tokens: what they promise in bytes and in error, and what they refuse."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from testbed.codecs import CodecError, cache_format
from testbed.codecs.codec import Codec, decode
from testbed.codecs.entropy.measure import entropy
from testbed.codecs.steps import Part
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import SHAPES, make_cache, ragged_cache, same_cache

CODERS = ("ans", "ans(tables=part)", "ans(tables=channel)", "lz4", "lz4(thorough=true)")


def gaussian(tokens: int = 2000) -> Tensor:
    """[2, tokens, 64]: channels of one distribution."""
    return torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0)).half()


def cache_of(x: Tensor) -> KVCache:
    return KVCache([KVLayer(x, x, torch.arange(x.shape[1]))], x.shape[1])


@pytest.mark.parametrize("coder, quantizer", [*itertools.product(CODERS, ("fp16", "int8", "int4", "int3"))])
def test_a_coder_gives_back_the_same_cache_for_every_shape(coder: str, quantizer: str) -> None:
    for name in [*SHAPES, "ragged"]:
        cache = ragged_cache() if name == "ragged" else make_cache(name)
        plain, coded = Codec(quantizer).encode(cache), Codec(f"{quantizer}+{coder}").encode(cache)
        assert same_cache(decode(coded), decode(plain))
        assert len(coded) <= len(plain) + 16 + 5 * 2 * len(cache.layers)


@pytest.mark.parametrize("text", ["int4", "int4(group=0)", "int3"])
def test_ans_saves_what_the_entropy_of_the_symbols_promises(text: str) -> None:
    x = gaussian()
    codec = Codec(text)
    part = Part(0, "keys", *x.shape, "float16")
    bits = codec.quantizer.symbol_bits(part)
    symbols, side = codec.quantizer.encode(part, x)
    assert side is not None
    found = entropy(symbols, bits, x.numel())
    assert found.bits_per_symbol <= bits
    assert found.bits_per_packed_byte <= 8
    assert found.bits_per_element == found.bits_per_symbol
    promised = 2 * (found.bits_per_symbol * x.numel() / 8 + side.numel() * side.element_size())
    size = len(Codec(f"{text}+ans").encode(cache_of(x)))
    assert promised <= size <= 1.02 * promised + 200


def test_entropy_of_symbols_that_are_equally_frequent_is_their_width() -> None:
    found = entropy(torch.arange(16, dtype=torch.uint8).repeat_interleave(16), 4, 512)
    assert found.bits_per_symbol == 4
    assert found.bits_per_element == 2


def test_channels_that_differ_are_worth_tables_of_their_own() -> None:
    x = gaussian()
    x[..., ::2] *= 0.05
    cache = cache_of(x)
    sizes = {coder: len(Codec(f"int4(group=0)+{coder}").encode(cache)) for coder in CODERS[:3]}
    assert sizes["ans"] <= sizes["ans(tables=channel)"] < 0.95 * sizes["ans(tables=part)"]


@given(
    st.sampled_from(["int4+ans", "int4+ans(tables=channel)", "fp16+ans", "int8+lz4", "delta+int4+ans"]),
    st.randoms(use_true_random=False),
)
def test_changed_bytes_under_a_right_checksum_never_crash(text: str, random: random.Random) -> None:
    cache = cache_of(gaussian(40) * torch.linspace(0.01, 1, 64).half())
    damaged = np.frombuffer(bytes(Codec(text).encode(cache)), dtype=np.uint8).copy()
    for _ in range(random.randrange(1, 6)):
        damaged[random.randrange(24, len(damaged))] = random.choice([0, 255, random.randrange(256)])
    try:
        decoded = decode(cache_format.seal(damaged))
    except PayloadError as error:
        assert "\n" not in str(error)
    else:
        assert decoded.nbytes <= 64 * 4 * len(damaged)


@pytest.mark.parametrize("order", ["anchor", "consecutive"])
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_differences_are_undone(order: str, loop: str) -> None:
    for name, anchor in itertools.product([*SHAPES, "ragged"], (2, 10)):
        cache = ragged_cache() if name == "ragged" else make_cache(name)
        text = f"delta(anchor={anchor}, loop={loop}, order={order})+fp16"
        decoded = decode(Codec(text).encode(cache))
        for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions)
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert a.shape == b.shape
                # 16 bits of a difference are off by half a unit in its last place; open loops add `anchor` of them up
                unit = torch.finfo(b.dtype).eps * (2 * b.double().abs().max() if b.numel() else 1)
                assert bool(
                    ((a.double() - b.double()).abs() <= unit * (anchor if loop == "open" else 2)).all()
                )


def smooth() -> Tensor:
    """Tokens that change slowly, as a walk."""
    steps = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(1))
    return (0.1 * steps.cumsum(1) + 3).half()


@pytest.mark.parametrize("order", ["anchor", "consecutive"])
def test_a_closed_loop_is_as_exact_as_the_quantizer_on_each_difference(order: str) -> None:
    """|x̂ - x| ≤ s / 2 where s is the step of the difference's group: at most the largest range of any difference / 15."""
    x = smooth()
    error = {
        loop: (
            decode(Codec(f"delta(loop={loop}, order={order})+int4").encode(cache_of(x)))
            .layers[0]
            .keys.double()
            - x.double()
        ).abs()
        for loop in ("closed", "open")
    }
    later = torch.arange(x.shape[1]) % 10 != 0
    assert error["closed"][:, later].mean() < error["open"][:, later].mean()
    plain = (decode(Codec("int4").encode(cache_of(x))).layers[0].keys.double() - x.double()).abs()
    assert error["closed"].mean() < plain.mean()


def test_a_closed_loop_refuses_a_quantizer_that_mixes_tokens() -> None:
    with pytest.raises(CodecError, match="codes each token by itself"):
        Codec("delta+int4(axis=channel)").encode(make_cache("grouped"))
    Codec("delta(loop=open)+int4(axis=channel)").encode(make_cache("grouped"))


def test_bytes_beside_differences_are_refused() -> None:
    codec = Codec("delta+int4")
    with pytest.raises(PayloadError):
        assert codec.transform is not None
        codec.transform.decode(make_cache("grouped").to(dtype=torch.float32), b"x")
