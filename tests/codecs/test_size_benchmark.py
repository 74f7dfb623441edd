"""The benchmark of sizes measures every method, and its entropies are of what is sent."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codec_size import every_method, size_of
from testbed.codecs import registry
from testbed.codecs.codec import Codec
from testbed.codecs.spec import parse
from testbed.models.kvcache import KVCache, KVLayer


def test_every_registered_method_is_measured() -> None:
    used = {method.name for text in every_method() for method in parse(text).methods}
    assert used == {name for table in registry.STAGES.values() for name in table}


def smooth_cache() -> KVCache:
    """Gaussian, every channel alike, so that a table for a whole part is as good as any."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(512)
    made = [torch.randn(2, 512, 64, generator=generator).half() for _ in range(4)]
    return KVCache([KVLayer(k, v, positions, None) for k, v in zip(made[::2], made[1::2], strict=True)], 512)


@pytest.mark.parametrize("text", ["int4+ans(tables=part)", "int4+zstd", "int3+ans(tables=part)"])
def test_coders_reach_what_the_entropy_of_symbols_says(text: str) -> None:
    cache, codec = smooth_cache(), Codec(text)
    size = size_of(codec, cache, None, len(codec.encode(cache)))
    assert size.payload_of_promise == pytest.approx(1, abs=0.02)
    assert size.coded_of_entropy == pytest.approx(1, abs=0.025)


def test_entropies_keep_to_their_names() -> None:
    cache = smooth_cache()
    for text, width, packed in [("int4", 4, 8), ("int8", 8, 8), ("kivi", 2, 8)]:
        codec = Codec(text)
        size = size_of(codec, cache, None, len(codec.encode(cache)))
        assert size.bits_per_symbol is not None
        assert size.bits_per_packed_byte is not None
        assert size.entropy_bits_per_element is not None
        assert 0.8 * width < size.bits_per_symbol <= width
        assert size.bits_per_symbol < size.bits_per_packed_byte <= packed or width == 8
        assert size.entropy_bits_per_element <= size.bits_per_symbol
        assert size.entropy_bits_per_element < size.bits_per_element
    assert size_of(Codec("fp16"), cache, None, 1).bits_per_symbol is None
