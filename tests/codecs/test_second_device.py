"""Where a cache's tensors are on a device of their own: nothing meets the processor's by accident."""

from __future__ import annotations

import pytest
import torch

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from tests.codecs.caches import make_cache, ragged_cache, same_cache
from tests.codecs.second_device import OTHER, second_device

CODECS = [
    "fp16",
    "int4",
    "int8+zstd",
    "int4(axis=channel)+ans",
    "fp8",
    "kivi",
    "kvquant(bits=3)",
    "normsep",
    "turbo",
    "mixed(protect=K0.V1)",
    "planes+zstd",
    "cachegen",
    "delta(loop=closed)+int4",
]


def test_tensors_of_two_devices_do_not_meet() -> None:
    with second_device():
        there = torch.ones(3).to(OTHER)
        assert there.device == OTHER and (there * 2 + torch.tensor(1)).to("cpu").tolist() == [3, 3, 3]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("text", CODECS)
def test_a_cache_on_another_device_gives_the_same_payload_and_a_payload_the_same_cache_there(
    text: str,
) -> None:
    for cache in (make_cache("sliding layers"), ragged_cache()):
        payload = Codec(text).encode(cache)
        with second_device():
            ours = Codec(text).encode(cache.to(OTHER))
            decoded = decode(payload, OTHER)
            assert all(layer.keys.device == layer.positions.device == OTHER for layer in decoded.layers)
            back = decoded.to("cpu")
        assert bytes(ours) == bytes(payload)
        assert same_cache(back, decode(payload))


@pytest.mark.parametrize("text", ["int8", "int4+zstd", "int3(symmetric=true)"])
def test_parts_together_are_refused_by_layer_and_large_numbers_are_their_parts_own(text: str) -> None:
    cache = make_cache("grouped")
    cache.layers[2].values.fill_(65504)[0, 0, 0] = -65504
    payload = Codec(text).encode(cache)
    with second_device():
        assert bytes(Codec(text).encode(cache.to(OTHER))) == bytes(payload)
        back = decode(payload, OTHER).to("cpu")
    assert same_cache(back, decode(payload))
    cache.layers[1].values[1, 4, 63] = float("nan")
    with second_device(), pytest.raises(CodecError, match="values of layer 1 hold NaN, infinity"):
        Codec(text).encode(cache.to(OTHER))
