"""Lossless 16-bit values: every bit pattern comes back, and a real spread of exponents takes fewer bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs.codec import Codec, decode
from testbed.codecs.entropy.exponents import Exponents
from testbed.codecs.steps import Part, Piece
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import same_cache

FORMATS = (torch.float16, torch.bfloat16)


def cache_of(bits: torch.Tensor, dtype: torch.dtype) -> KVCache:
    """A layer of one head whose keys and values have these bit patterns, int16 [tokens, dim]."""
    values = bits.view(dtype)[None]
    return KVCache([KVLayer(values, values.flip(1), torch.arange(len(bits)))], len(bits))


def gaussian(dtype: torch.dtype) -> KVCache:
    numbers = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return KVCache([KVLayer(numbers, numbers.flip(1), torch.arange(400))], 400)


@pytest.mark.parametrize("text", ["lossless", "lossless(coder=ans)"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bit_pattern_comes_back_nan_infinity_and_denormals_among_them(
    dtype: torch.dtype, text: str
) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(512, 128)
    cache = cache_of(bits, dtype)
    assert bool(cache.layers[0].keys.isnan().any() & cache.layers[0].keys.isinf().any())
    assert same_cache(decode(Codec(text).encode(cache)), cache)


@given(st.binary(min_size=2, max_size=400), st.sampled_from(FORMATS), st.integers(1, 200))
def test_any_numbers_repeated_come_back(data: bytes, dtype: torch.dtype, times: int) -> None:
    numbers = np.frombuffer(data[: len(data) // 2 * 2] * times, dtype="<i2")
    cache = cache_of(torch.from_numpy(numbers.copy())[:, None], dtype)
    assert same_cache(decode(Codec("lossless").encode(cache)), cache)


@pytest.mark.parametrize("coder, room", [("ans", 1.01), ("zstd", 1.04)])
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_bytes_are_those_of_the_exponents_entropy_and_a_byte_a_number(
    dtype: torch.dtype, coder: str, room: float
) -> None:
    cache = gaussian(dtype)
    payload = Codec(f"lossless(coder={coder})").encode(cache)
    assert same_cache(decode(payload), cache)
    numbers = cache.layers[0].keys.contiguous().view(torch.int16).numpy().view("<u2").flatten()
    counts = np.unique(numbers // 128 % 256, return_counts=True)[1]
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum() / 8  # bytes a number
    least = 2 * len(numbers) * (1 + entropy)
    assert least <= len(payload) <= room * least + 1000


@pytest.mark.parametrize("coder", ["zstd", "ans"])
def test_what_no_encoder_writes_is_refused(coder: Literal["zstd", "ans"]) -> None:
    part = Part(0, "keys", 1, 40, 10, "bfloat16")
    piece = Piece(part, 16, 400, 0, 0, 0, 800)
    data = np.arange(0, 64_000, 160).astype("<u2")
    coded = Exponents(coder).compress(piece, data.data.cast("B"))
    assert bytes(Exponents(coder).expand(piece, memoryview(coded))) == data.tobytes()
    for wrong in (b"", coded[:400], coded[:401], coded[:-4], coded + b"\0\0\0\1"):
        with pytest.raises(PayloadError):
            Exponents(coder).expand(piece, memoryview(wrong))
