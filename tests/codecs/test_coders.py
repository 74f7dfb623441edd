"""What entropy coders promise in bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testbed.codecs.codec import Codec
from testbed.codecs.steps import Part
from testbed.models.kvcache import KVCache, KVLayer


def gaussian() -> Tensor:
    """[2, 2000, 64]: channels of one distribution."""
    return torch.randn(2, 2000, 64, generator=torch.Generator().manual_seed(0)).half()


def cache_of(x: Tensor) -> KVCache:
    return KVCache([KVLayer(x, x, torch.arange(x.shape[1]))], x.shape[1])


@pytest.mark.parametrize("text", ["int4", "int4(group=0)", "int3"])
def test_ans_saves_what_the_entropy_of_the_symbols_promises(text: str) -> None:
    x = gaussian()
    codec = Codec(text)
    part = Part(0, "keys", *x.shape, "float16")
    symbols, side = codec.quantizer.encode(part, x)
    assert side is not None
    share = symbols.flatten().bincount() / x.numel()
    bits = float(-(share * share.clamp_min(1e-9).log2()).sum())
    promised = 2 * (bits * x.numel() / 8 + side.numel() * side.element_size())
    size = len(Codec(f"{text}+ans").encode(cache_of(x)))
    assert promised <= size <= 1.02 * promised + 200


def test_channels_that_differ_are_worth_tables_of_their_own() -> None:
    x = gaussian()
    x[..., ::2] *= 0.05
    cache = cache_of(x)
    coders = ("ans", "ans(tables=part)", "ans(tables=channel)")
    sizes = {coder: len(Codec(f"int4(group=0)+{coder}").encode(cache)) for coder in coders}
    assert sizes["ans"] <= sizes["ans(tables=channel)"] < 0.95 * sizes["ans(tables=part)"]
