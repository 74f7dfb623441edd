"""CacheGen: levels by layer, scales by token, differences to anchors, and the coder that it brings with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from testbed.codecs.codec import Codec, decode
from testbed.codecs.spec import parse
from testbed.codecs.steps import Part
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import CACHES, cache_of, make_cache, same_cache

TEXTS = (
    "cachegen",
    "cachegen(level=1)",
    "cachegen(level=4)",
    "cachegen(anchor=10)",
    "cachegen(level=3, anchor=3)",
)
EVERY = [*itertools.product(TEXTS, CACHES)]
#: Bins of keys and values as the release has them for 32 layers: (first layer, last layer, level) -> bins
RELEASED = [
    ("keys", 0, 9, {1: 16, 2: 32, 3: 32}),
    ("keys", 10, 19, {1: 16, 2: 16, 3: 32}),
    ("keys", 20, 31, {1: 12, 2: 16, 3: 32}),
    ("values", 0, 1, {1: 16, 2: 32, 3: 32}),
    ("values", 2, 31, {1: 12, 2: 16, 3: 32}),
]


def released_bins(kind: str, layer: int, level: int, layers: int = 32) -> int:
    """Of a layer of a model of so many: those of the stretch of the release that begins at the same depth or before."""
    stretches = [(first, bins) for what, first, _, bins in RELEASED if what == kind]
    starts = [0, *(max(1, int(first * layers / 32 + 0.5)) for first, _ in stretches[1:])]
    found = [
        ({4: 64} | bins)[level] for start, (_, bins) in zip(starts, stretches, strict=True) if start <= layer
    ]
    return found[-1]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_bins_are_those_of_the_release(level: int) -> None:
    method = parse(f"cachegen(level={level})").quantizer
    for layer in range(32):
        for kind in ("keys", "values"):
            part = Part(layer, kind, 2, 3, 4, "float16", 32)  # type: ignore[arg-type]
            bins = next(b for what, first, last, b in RELEASED if what == kind and first <= layer <= last)
            assert method.bins(part) == bins[level]  # type: ignore[attr-defined]


def test_bins_change_at_the_same_depth_in_models_of_other_depth() -> None:
    method = parse("cachegen(level=1)").quantizer

    def changes(kind: str, layers: int) -> list[int]:
        bins = [
            method.bins(Part(i, kind, 2, 3, 4, "float16", layers))  # type: ignore[attr-defined, arg-type]
            for i in range(layers)
        ]
        return [i for i in range(1, layers) if bins[i] != bins[i - 1]]

    # level 1 has 16, 16, 12 bins for keys, 16, 12 for values: tenths of 32 layers are 10 / 32 of any number
    assert changes("keys", 32) == [20] and changes("values", 32) == [2]
    assert changes("keys", 80) == [50] and changes("values", 80) == [5]
    assert changes("keys", 30) == [19] and changes("values", 30) == [2]
    assert changes("values", 4) == [1]


def step(x: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """The scale of each token, at most: the largest element over the levels, rounded up in 16 bits."""
    info = torch.finfo(dtype)
    largest = x.abs().amax((0, 2), keepdim=True) / most
    return largest * (1 + info.eps) + info.smallest_normal * info.eps


@pytest.mark.parametrize("text, name", EVERY)
def test_elements_are_within_half_a_step(text: str, name: str) -> None:
    cache = cache_of(name)
    method = Codec(text).quantizer
    level, anchor = method.level, method.anchor  # type: ignore[attr-defined]
    decoded = decode(Codec(text).encode(cache))
    for i, (ours, theirs) in enumerate(zip(decoded.layers, cache.layers, strict=True)):
        for kind in ("keys", "values"):
            x, back = getattr(theirs, kind).double(), getattr(ours, kind).double()
            if not x.numel():
                continue
            most = released_bins(kind, i, level, len(cache.layers)) // 2 - 1
            bound = step(x, most, cache.dtype).expand_as(x) / 2
            if anchor:
                anchors = x[:, ::anchor]
                fine = step(anchors, 127, cache.dtype) / 2
                group = torch.arange(x.shape[1]) // anchor
                # a difference is to the anchor as it arrives, which is off by up to half an anchor's step
                bound = (x - anchors[:, group]).abs().amax((0, 2), keepdim=True) + fine[:, group]
                bound = step(bound, most, cache.dtype).expand_as(x) / 2
                bound = torch.where(
                    (torch.arange(x.shape[1]) % anchor == 0)[None, :, None], fine[:, group], bound
                )
            slack = torch.finfo(cache.dtype).eps * (x.abs() + bound) + 1e-7
            assert bool(((back - x).abs() <= bound + slack).all())


def test_the_coder_is_its_own_unless_another_is_named() -> None:
    cache = make_cache("grouped")
    own = decode(Codec("cachegen").encode(cache))
    for coder in ("zstd", "ans", "lz4"):
        assert same_cache(decode(Codec(f"cachegen+{coder}").encode(cache)), own)
    assert bytes(Codec("cachegen").encode(cache)) == bytes(Codec("cachegen").encode(make_cache("grouped")))


def alike(tokens: int) -> KVCache:
    """Channels of different spread, and tokens close to their neighbours."""
    generator = torch.Generator().manual_seed(0)
    spread = 2.0 ** torch.randint(-4, 4, (2, 1, 64), generator=generator)
    walk = torch.randn(2, tokens, 64, generator=generator).mul(0.1).cumsum(1)
    x = (walk * spread).half()
    return KVCache([KVLayer(x, x, torch.arange(tokens))], tokens)


def test_tables_by_channel_pay_for_themselves_where_channels_differ() -> None:
    cache = alike(2000)
    assert len(Codec("cachegen").encode(cache)) < 0.9 * len(Codec("cachegen+ans(tables=part)").encode(cache))


def test_differences_to_anchors_err_less_where_tokens_are_alike() -> None:
    cache = alike(500)

    def error(text: str) -> float:
        back = decode(Codec(text).encode(cache)).layers[0].keys
        return float((back.float() - cache.layers[0].keys.float()).square().mean())

    assert error("cachegen(anchor=10)") < 0.5 * error("cachegen")


@pytest.mark.parametrize("text", ["cachegen(level=0)", "cachegen(level=5)", "cachegen(anchor=1)"])
def test_levels_and_anchors_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"cachegen: (level|anchor) is"):
        parse(text)
