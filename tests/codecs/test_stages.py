"""The stages that ship few methods yet carry any: a toy transform, and a toy coder of symbols instead of packed bytes."""

from __future__ import annotations

import bz2
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from testbed.codecs import registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.steps import Coder, Piece, Quantizer, Transform
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache
from tests.codecs.caches import make_cache, same_cache


@dataclass(frozen=True)
class Centred(Transform):
    """Subtracts each channel's mean, which travels beside the rest."""

    name: ClassVar[str] = "centred"
    source: ClassVar[str] = "this test"

    def encode(self, cache: KVCache, quantizer: Quantizer) -> tuple[KVCache, bytes]:
        changed, means = cache.to(dtype=torch.float32), []
        for layer in changed.layers:
            mean = layer.keys.mean(1, keepdim=True)
            layer.keys = layer.keys - mean
            means.append(mean.flatten())
        return changed, torch.cat(means).numpy().tobytes()

    def decode(self, cache: KVCache, side: bytes) -> KVCache:
        if len(side) != 4 * sum(layer.kv_heads * layer.head_dim for layer in cache.layers):
            raise PayloadError("means of another size")
        means = torch.frombuffer(bytearray(side), dtype=torch.float32)
        for layer in cache.layers:
            size = layer.kv_heads * layer.head_dim
            layer.keys = layer.keys + means[:size].view(layer.kv_heads, 1, layer.head_dim)
            means = means[size:]
        return cache


@dataclass(frozen=True)
class Bzip(Coder):
    """bzip2 over a byte a symbol."""

    name: ClassVar[str] = "bzip"
    source: ClassVar[str] = "this test"
    packed: ClassVar[bool] = False

    def compress(self, piece: Piece, data: memoryview) -> bytes:
        assert len(data) == self.input_bytes(piece)
        return bz2.compress(data)

    def expand(self, piece: Piece, data: memoryview) -> bytes:
        return bz2.BZ2Decompressor().decompress(data, self.input_bytes(piece))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TRANSFORMS, "centred", f"{__name__}:Centred")
    monkeypatch.setitem(registry.CODERS, "bzip", f"{__name__}:Bzip")


@pytest.mark.parametrize("coder", ["", "+zstd", "+bzip"])
@pytest.mark.parametrize("quantizer", ["fp16", "int8", "int4"])
def test_a_transform_is_undone_behind_the_quantizer(quantizer: str, coder: str) -> None:
    cache = make_cache("grouped")
    decoded = decode(Codec(f"window@0.5+centred+{quantizer}{coder}").encode(cache))
    if coder:
        assert same_cache(decoded, decode(Codec(f"window@0.5+centred+{quantizer}").encode(cache)))
    plain = decode(Codec(quantizer).encode(cache))
    for ours, theirs, layer in zip(decoded.layers, plain.layers, cache.layers, strict=True):
        assert ours.keys.dtype == torch.float16
        error, usual = ((x.keys - layer.keys).float().abs().mean() for x in (ours, theirs))
        assert error < max(0.9 * usual, 1e-3)


def test_symbols_that_repeat_are_coded_shorter_than_packed() -> None:
    cache = make_cache("grouped")
    for layer in cache.layers:
        layer.keys = (layer.keys > 0).half() + torch.tensor([0.0, 0.5]).half().repeat(32)
    for coder in ("zstd", "bzip"):
        assert len(Codec(f"int4+{coder}").encode(cache)) < 0.9 * len(Codec("int4").encode(cache))
