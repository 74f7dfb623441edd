from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.entropy import pack, unpack
from testbed.codecs.quantize.integer import Integer
from testbed.codecs.steps import Part
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import SHAPES, make_cache, ragged_cache, same_bits, same_cache

QUANTIZERS = (
    "int8",
    "int8(group=32)",
    "int8(symmetric=false)",
    "int4",
    "int4(group=0)",
    "int4(group=24)",
    "int4(symmetric=true)",
    "int4(axis=channel)",
    "int8(axis=channel, group=0)",
    "int3",
    "int3(symmetric=true, axis=channel)",
    "int2",
    "int2(symmetric=true)",
    "int2(axis=channel)",
)


def group_bounds(x: Tensor, bits: int, group: int, symmetric: bool, axis: str) -> Tensor:
    """The largest error that |x̂ - x| may have, element by element, from the formula in `Integer`.

    Half a step, the step being the range over the levels, rounded to the 16-bit format (or up to its next number), plus
    half a unit in the last place of a number as large as x̂ may be.
    """
    if axis == "channel":
        return group_bounds(x.transpose(-1, -2), bits, group, symmetric, "token").transpose(-1, -2)
    if not x.numel():
        return torch.zeros(x.shape, dtype=torch.float64)
    info = torch.finfo(x.dtype)
    size = group or x.shape[-1]
    bounds = []
    for chunk in x.double().split(size, dim=-1):
        largest = chunk.abs().amax(-1, keepdim=True)
        if symmetric:
            step = largest / (2 ** (bits - 1) - 1)
        else:
            step = (chunk.amax(-1, keepdim=True) - chunk.amin(-1, keepdim=True)) / (2**bits - 1)
        spacing = info.eps * step + info.smallest_normal * info.eps  # of 16-bit numbers near the step
        step = (step + spacing).clamp_min(torch.finfo(torch.float32).tiny)
        last_place = info.eps * (largest + step) + info.smallest_normal * info.eps
        bounds.append((0.5 * step + 0.5 * last_place).expand_as(chunk))
    return torch.cat(bounds, -1) * (1 + 2**-7)  # float32 arithmetic: the quotient is up to 2^15, good to 2^-8


def settings(text: str) -> tuple[int, int, bool, str]:
    quantizer = Codec(text).quantizer
    return quantizer.width, quantizer.group, quantizer.symmetric, quantizer.axis  # type: ignore[attr-defined]


def round_trip(x: Tensor, text: str) -> Tensor:
    """x [heads, tokens, dim] as keys through the codec."""
    cache = KVCache([KVLayer(x, x, torch.arange(x.shape[1]))], x.shape[1])
    return decode(Codec(text).encode(cache)).layers[0].keys


def assert_within_bound(x: Tensor, text: str) -> None:
    error = (round_trip(x, text).double() - x.double()).abs()
    bound = group_bounds(x, *settings(text))
    worst = (error - bound).argmax()
    assert bool((error <= bound).all()), f"{error.flatten()[worst]} > {bound.flatten()[worst]}"


@pytest.mark.parametrize("text, shape", [*itertools.product(QUANTIZERS, SHAPES)])
def test_decoded_values_are_within_the_derived_bound(text: str, shape: str) -> None:
    cache = make_cache(shape)
    decoded = decode(Codec(text).encode(cache))
    for layer, original in zip(decoded.layers, cache.layers, strict=True):
        assert torch.equal(layer.positions, original.positions)
        for values, expected in ((layer.keys, original.keys), (layer.values, original.values)):
            assert values.dtype == expected.dtype
            assert values.shape == expected.shape
            error = (values.double() - expected.double()).abs()
            assert bool((error <= group_bounds(expected, *settings(text))).all())


extremes = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 1.4e-7, 6e-5, 1e-3, 65504.0, -65504.0, 30000.0, 5.5]
)


@given(
    st.lists(extremes | st.floats(-65504, 65504, width=16), min_size=1, max_size=40),
    st.sampled_from(QUANTIZERS),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_any_finite_values_are_within_the_bound(values: list[float], text: str, dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    x = torch.where(x.isinf(), torch.zeros_like(x), x)  # bf16 rounds nothing here to infinity, fp16 might
    assert_within_bound(x[None, None], text)
    assert bool(torch.isfinite(round_trip(x[None, None], text)).all())


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("exponent", [-133, -126, -120, -60, 60, 120, 127])
def test_bfloat16_keeps_its_range(text: str, exponent: int) -> None:
    x = (torch.linspace(-1.9, 1.9, 64, dtype=torch.float64) * 2.0**exponent).to(torch.bfloat16)
    assert_within_bound(x[None, None], text)
    assert bool(torch.isfinite(round_trip(x[None, None], text)).all())


@pytest.mark.parametrize("text", ["int8", "int4", "int4(symmetric=true)"])
def test_the_largest_fp16_numbers_stay_finite(text: str) -> None:
    for row in ([65504.0, 0.0], [-65504.0, 65504.0], [65504.0, 65472.0], [-65504.0, -1.0]):
        assert_within_bound(torch.tensor(row * 16).half()[None, None], text)
        assert bool(torch.isfinite(round_trip(torch.tensor(row * 16).half()[None, None], text)).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.14, 6e-8, 65504.0, -65504.0])
def test_equal_elements_are_exact_where_there_is_a_zero_point(value: float) -> None:
    x = torch.full((2, 3, 64), value).half()
    assert torch.equal(round_trip(x, "int4"), x)


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_with_the_place(text: str, value: float) -> None:
    cache = make_cache("grouped")
    cache.layers[2].values[1, 7, 33] = value
    with pytest.raises(CodecError, match="values of layer 2"):
        Codec(text).encode(cache)


def test_fp16_is_exact_whatever_the_bits() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).view(4, 256, 64)
        assert same_bits(round_trip(x, "fp16"), x)
        assert same_bits(round_trip(x, "fp16+zstd"), x)


@pytest.mark.parametrize("name", SHAPES)
def test_fp16_carries_every_cache_bit_for_bit(name: str) -> None:
    cache = make_cache(name)
    assert same_cache(decode(Codec("fp16").encode(cache)), cache)
    assert same_cache(decode(Codec("fp16+zstd").encode(cache)), cache)


def test_layers_and_heads_may_hold_different_tokens() -> None:
    cache = ragged_cache()
    assert same_cache(decode(Codec("fp16").encode(cache)), cache)
    assert [layer.positions.shape for layer in decode(Codec("int4+zstd").encode(cache)).layers] == [
        layer.positions.shape for layer in cache.layers
    ]


@pytest.mark.parametrize("text", ["int8", "int4", "int3", "int2(axis=channel)"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_entropy_coder_changes_the_bytes_and_not_the_cache(text: str, name: str) -> None:
    cache = make_cache(name)
    plain, coded = Codec(text).encode(cache), Codec(f"{text}+zstd").encode(cache)
    assert same_cache(decode(plain), decode(coded))
    assert len(coded) <= len(plain) + 8 + 5 * 2 * len(cache.layers)


def budget_bits(cache: KVCache, text: str) -> float:
    """Bits of symbols, scales (16 a group) and zero points (16 more), from the shapes."""
    if text == "fp16":
        return 8 * cache.nbytes
    bits, group, symmetric, axis = settings(text)
    total = 0
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            heads, rows, elements = x.shape if axis == "token" else x.transpose(1, 2).shape
            groups = -(-elements // (group or elements or 1))
            total += x.numel() * bits + heads * rows * groups * (16 if symmetric else 32)
    return total


@pytest.mark.parametrize("text, name", [*itertools.product(("fp16", *QUANTIZERS), [*SHAPES, "ragged"])])
def test_the_payload_is_as_large_as_the_bit_budget_says(text: str, name: str) -> None:
    cache = ragged_cache() if name == "ragged" else make_cache(name)
    budget = budget_bits(cache, text) / 8
    size = len(Codec(text).encode(cache))
    assert budget <= size <= 1.02 * budget + 1024


@pytest.mark.parametrize("text", ["fp16", "int8", "int4", "fp16+zstd", "int4+zstd"])
def test_equal_caches_give_equal_bytes(text: str) -> None:
    # "one token" and "odd dimensions" leave gaps between parts, which must not hold what memory held before
    for name in ("grouped", "odd dimensions", "one token"):
        first = bytes(Codec(text).encode(make_cache(name)))
        torch.rand(100_000)
        assert bytes(Codec(text).encode(make_cache(name))) == first


def test_views_are_encoded_like_the_tensors_they_show() -> None:
    cache = make_cache("grouped")
    views = [
        KVLayer(
            layer.keys.transpose(0, 1).contiguous().transpose(0, 1),
            torch.cat([layer.values, layer.values], -1)[..., :64],
            layer.positions,
        )
        for layer in cache.layers
    ]
    for text in ("fp16", "int8", "int4+zstd"):
        assert bytes(Codec(text).encode(KVCache(views, cache.length))) == bytes(Codec(text).encode(cache))


def test_encoding_leaves_the_cache_as_it_was() -> None:
    cache = make_cache("grouped")
    for text in ("fp16", "int8", "int4"):
        decoded = decode(Codec(text).encode(cache))
        decoded.layers[0].keys.zero_()
    assert same_cache(cache, make_cache("grouped"))


@given(st.integers(1, 8), st.integers(0, 50), st.randoms(use_true_random=False))
def test_packing_is_reversible_and_true_to_size(bits: int, count: int, random: object) -> None:
    symbols = torch.tensor([random.randrange(2**bits) for _ in range(count)], dtype=torch.uint8)  # type: ignore[attr-defined]
    packed = pack(symbols, bits)
    wasted = len(packed) - -(-count * bits // 8)
    assert (
        wasted == 0 if 8 % bits == 0 else 0 <= wasted <= 2
    )  # 7 bits are packed as 4, 2 and 1, each to whole bytes
    assert torch.equal(unpack(packed, count, bits), symbols)


def test_a_cache_in_another_format_is_refused() -> None:
    with pytest.raises(CodecError, match="float32 cannot be encoded"):
        Codec("fp16").encode(make_cache("grouped").to(dtype=torch.float32))


def test_positions_that_do_not_fit_are_refused() -> None:
    cache = make_cache("grouped")
    cache.layers[1].positions = cache.layers[1].positions.flip(0)
    with pytest.raises(CodecError, match="layer 1: positions must ascend"):
        Codec("int8").encode(cache)
    cache.layers[1].positions = torch.arange(5)
    with pytest.raises(CodecError, match="layer 1: the shapes"):
        Codec("int8").encode(cache)


@pytest.mark.parametrize("text", [*QUANTIZERS, "mixed(protect=K0.V1)", "int4+ans", "int3+zstd", "int8+ans"])
def test_the_compiled_loops_give_the_bytes_and_values_of_torch(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name in ("grouped", "multi-head bf16", "latent", "odd dimensions"):
        cache = make_cache(name)
        cache.layers[0].keys[0, :2] *= 1e-4  # fp16's subnormal numbers
        cache.layers[0].values[0, 0] = -0.0
        compiled = Codec(text).encode(cache)
        decoded = decode(compiled)
        with monkeypatch.context() as patch:
            patch.setattr(Integer, "uniform", lambda *_: None)
            assert bytes(Codec(text).encode(cache)) == bytes(compiled)
            for ours, theirs in zip(decoded.layers, decode(compiled).layers, strict=True):
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("text", ["int8", "int4", "int3(symmetric=true)"])
def test_a_part_by_itself_gives_the_symbols_and_scales_of_torch(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    x, quantizer = make_cache("grouped").layers[0].keys, Codec(text).quantizer
    part = Part(0, "keys", *x.shape, "float16")
    symbols, side = quantizer.encode(part, x)
    monkeypatch.setattr(Integer, "_fusible", lambda *_: False)
    expected, numbers = quantizer.encode(part, x)
    assert torch.equal(symbols, expected)
    assert side is not None and numbers is not None
    assert torch.equal(side.flatten().view(torch.int16), numbers.contiguous().flatten().view(torch.int16))


@given(st.sampled_from([4, 3, 2]), st.integers(0, 70), st.randoms(use_true_random=False))
def test_the_compiled_packing_is_that_of_torch(bits: int, count: int, random: object) -> None:
    from testbed.codecs.quantize import packing

    symbols = torch.tensor([random.randrange(2**bits) for _ in range(count)], dtype=torch.uint8)  # type: ignore[attr-defined]
    expected = pack(symbols, bits)
    packed, back = torch.empty_like(expected), torch.full_like(symbols, 0xFF)
    packing.pack(symbols.numpy(), bits, packed.numpy())
    packing.unpack(packed.numpy(), bits, back.numpy())
    assert torch.equal(packed, expected)
    assert torch.equal(back, symbols)


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    cache, before = make_cache("sliding layers"), torch.get_num_threads()
    try:
        for text in ("int8", "int4+zstd"):
            made = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                made.append(bytes(Codec(text).encode(cache)))
                assert same_cache(decode(made[-1]), decode(made[0]))
            assert made[0] == made[1]
    finally:
        torch.set_num_threads(before)
