"""What `benchmarks.device_codecs` times is the codecs' own arithmetic."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codec_speed import made_cache
from benchmarks.device_codecs import decode, encode
from testbed.codecs import codec as codecs
from testbed.codecs.quantize.integer import Integer
from testbed.codecs.steps import Part


@pytest.mark.parametrize("text", ["int8", "int4", "int2"])
def test_torchs_ways_give_what_the_payload_gives(text: str) -> None:
    cache = made_cache("smollm2", 40, "cpu")
    codec = codecs.Codec(text)
    x = torch.cat([values for layer in cache.layers for values in (layer.keys, layer.values)])
    assert isinstance(codec.quantizer, Integer)
    packed, side = encode(codec.quantizer, x)
    found = decode(codec.quantizer, Part(0, "keys", *x.shape, "float16"), (packed, side))
    rebuilt = codecs.decode(codec.encode(cache))
    assert torch.equal(
        found, torch.cat([values for layer in rebuilt.layers for values in (layer.keys, layer.values)])
    )
    assert packed.numel() + side.nbytes <= len(codec.encode(cache))
