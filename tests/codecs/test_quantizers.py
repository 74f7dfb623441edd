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
from testbed.codecs.fast import uniform
from testbed.codecs.fast.batch import Reader
from testbed.codecs.layout import lay_out
from testbed.codecs.quantize.integer import INTEGERS, Integer
from testbed.codecs.steps import Part
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import CACHES, cache_of, make_cache, same_bits, same_cache, unlike_cache

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


@pytest.mark.parametrize("text, name", [*itertools.product(QUANTIZERS, CACHES)])
def test_decoded_values_are_within_the_derived_bound(text: str, name: str) -> None:
    cache = cache_of(name)
    decoded = decode(Codec(text).encode(cache))
    for layer, original in zip(decoded.layers, cache.layers, strict=True):
        for values, expected in ((layer.keys, original.keys), (layer.values, original.values)):
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


def test_fp16_is_exact_whatever_the_bits() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).view(4, 256, 64)
        assert same_bits(round_trip(x, "fp16"), x)
        assert same_bits(round_trip(x, "fp16+zstd"), x)


@pytest.mark.parametrize("name", CACHES)
def test_fp16_carries_every_cache_bit_for_bit(name: str) -> None:
    cache = cache_of(name)
    assert same_cache(decode(Codec("fp16").encode(cache)), cache)
    assert same_cache(decode(Codec("fp16+zstd").encode(cache)), cache)


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
    for cache in (unlike_cache(), make_cache("multi-head bf16")):
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


@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    group=st.sampled_from([0, 8, 16, 48]),
    symmetric=st.booleans(),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 9),
    head_dim=st.sampled_from([48, 96, 10]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_symbols_and_scales_are_decoded_as_torch_decodes_them(
    bits: int,
    group: int,
    symmetric: bool,
    heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Beside each other, so that not all of them begin where a whole vector may be written."""
    quantizer = INTEGERS[bits](group=group, symmetric=symmetric)
    part = Part(0, "keys", heads, tokens, head_dim, str(dtype).removeprefix("torch."))
    layout = lay_out([part, part, part], quantizer)
    random = torch.Generator().manual_seed(seed)
    side, packed = (
        torch.randint(0, 256, (size,), generator=random, dtype=torch.uint8)
        for size in (layout.side_bytes, layout.symbol_bytes)
    )
    reader = Reader(quantizer, layout, side, dtype, torch.device("cpu"))
    reader.read_packed(range(3), packed)
    for piece, found in zip(layout.pieces, reader.targets, strict=True):
        own = packed[piece.symbols_at : piece.symbols_at + piece.symbol_bytes]
        symbols = unpack(own, piece.symbols, bits).clone()
        numbers = side[piece.side_at : piece.side_at + piece.side_bytes]
        expected = quantizer.decode(part, symbols, numbers).to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())  # of which there are many
        assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@given(st.sampled_from([4, 3, 2]), st.integers(0, 70), st.randoms(use_true_random=False))
def test_the_compiled_packing_is_that_of_torch(bits: int, count: int, random: object) -> None:
    symbols = torch.tensor([random.randrange(2**bits) for _ in range(count)], dtype=torch.uint8)  # type: ignore[attr-defined]
    expected = pack(symbols, bits)
    packed, back = torch.empty_like(expected), torch.full_like(symbols, 0xFF)
    uniform.pack(symbols.numpy(), bits, packed.numpy())
    uniform.unpack(packed.numpy(), bits, back.numpy())
    assert torch.equal(packed, expected)
    assert torch.equal(back, symbols)
