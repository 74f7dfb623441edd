"""The quantizers beyond plain integers: what each promises, on caches of every shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.codecs.codec import Codec, decode
from testbed.codecs.quantize.rotation import rotation
from testbed.codecs.quantize.turbo import gaussian_levels
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.likelihood import mean_kl
from testbed.models.loading import load_model
from tests.codecs.caches import CACHES, cache_of, same_bits
from tests.codecs.test_quantizers import group_bounds


def pairs(original: KVCache, decoded: KVCache) -> list[tuple[str, Tensor, Tensor]]:
    """("keys" or "values", x, x̂) of every layer, in float64."""
    return [
        (kind, getattr(a, kind).double(), getattr(b, kind).double())
        for a, b in zip(original.layers, decoded.layers, strict=True)
        for kind in ("keys", "values")
    ]


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of numbers as large as x, in a 16-bit format."""
    info = torch.finfo(dtype)
    return (x.abs() * info.eps + info.smallest_normal * info.eps) / 2 * (1 + 2**-7)


def fp8_bound(x: Tensor, dtype: torch.dtype, scale: str) -> Tensor:
    """Half of E4M3's spacing: 2^-4 of a number, 2^-10 of the scale below 2^-6 of it."""
    if not x.numel():
        return x
    info = torch.finfo(dtype)
    largest = x.abs().amax((-1,) if scale == "token" else (-2, -1), keepdim=True)
    step = largest / 448 * (1 + info.eps) + info.smallest_normal * info.eps
    return torch.maximum(x.abs() / 16, step / 1024) + rounding(x.abs() * 17 / 16 + step, dtype)


@pytest.mark.parametrize("scale", ["token", "head"])
@pytest.mark.parametrize("name", CACHES)
def test_fp8_is_within_half_of_its_spacing(scale: str, name: str) -> None:
    cache = cache_of(name)
    for _, x, back in pairs(cache, decode(Codec(f"fp8(scale={scale})").encode(cache))):
        assert bool(((back - x).abs() <= fp8_bound(x, cache.dtype, scale)).all())


@given(
    st.lists(st.floats(-65504, 65504, width=16), min_size=1, max_size=40),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_fp8_of_any_finite_values_is_within_half_of_its_spacing(
    values: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)[None, None]
    back = decode(Codec("fp8").encode(KVCache([KVLayer(x, x, torch.arange(1))], 1))).layers[0].keys
    assert bool(((back.double() - x.double()).abs() <= fp8_bound(x.double(), dtype, "token")).all())


@pytest.mark.parametrize("bits, group, residual", [(2, 32, 128), (2, 8, 5), (4, 32, 0), (3, 16, 20)])
@pytest.mark.parametrize("name", CACHES)
def test_kivi_keeps_the_last_tokens_and_bounds_the_others(
    name: str, bits: int, group: int, residual: int
) -> None:
    cache = cache_of(name)
    decoded = decode(Codec(f"kivi(bits={bits}, group={group}, residual={residual})").encode(cache))
    for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
        old = max(0, theirs.tokens - residual)
        for kind, axis in (("keys", "channel"), ("values", "token")):
            x, back = getattr(theirs, kind), getattr(ours, kind)
            assert same_bits(back[:, old:].contiguous(), x[:, old:].contiguous())
            bound = group_bounds(x[:, :old], bits, group, False, axis)
            assert bool(((back[:, :old].double() - x[:, :old].double()).abs() <= bound).all())


@pytest.mark.parametrize("bits, group, symmetric", [(4, 0, False), (3, 16, True), (8, 0, False)])
@pytest.mark.parametrize("name", CACHES)
def test_normsep_is_within_twice_the_error_of_the_direction(
    name: str, bits: int, group: int, symmetric: bool
) -> None:
    """x = r·u is sent as r and û; scaling û back to ‖u‖ moves it by no more than ‖û - u‖ again."""
    cache = cache_of(name)
    text = f"normsep(bits={bits}, group={group}, symmetric={str(symmetric).lower()})"
    for _, x, back in pairs(cache, decode(Codec(text).encode(cache))):
        if not x.numel():
            continue
        size = x.square().mean(-1, keepdim=True).sqrt()
        u = x / size
        # in 16 bits: the grid's zero points and scales, and r; u is made with the r that is sent
        eps = torch.finfo(cache.dtype).eps
        step = group_bounds(u.to(torch.float32).to(cache.dtype), bits, group, symmetric, "channel")
        per_element = step + 2 * eps * (u.abs().amax(-2, keepdim=True) + 1)
        bound = 2 * size * per_element.square().sum(-1, keepdim=True).sqrt()
        bound = bound + rounding(x, cache.dtype).square().sum(-1, keepdim=True).sqrt() * 3
        assert bool(((back - x).square().sum(-1, keepdim=True).sqrt() <= bound).all())


def test_normsep_withstands_outlier_channels_that_ruin_a_grid_for_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 64, generator=generator) * (1 + 4 * torch.rand(2, 200, 1, generator=generator))
    x[..., [3, 40]] *= 60
    cache = KVCache([KVLayer(x.half(), x.half(), torch.arange(200))], 200)
    quiet = [channel for channel in range(64) if channel not in (3, 40)]

    def error(text: str) -> float:
        back = decode(Codec(text).encode(cache)).layers[0].keys
        return float((back.float() - x)[..., quiet].square().mean())

    assert error("normsep") < 0.1 * error("int4(group=0)")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 80, 128, 256])
def test_rotations_are_orthogonal_and_follow_the_seed(size: int) -> None:
    matrix = rotation(size, 5).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert torch.equal(rotation(size, 5), rotation(size, 5))
    if size > 7:
        assert not torch.equal(rotation(size, 5), rotation(size, 6))


# J. Max, "Quantizing for Minimum Distortion", 1960, table I: mean square error of 2, 4, 8, 16 and 32 levels
@pytest.mark.parametrize(
    "bits, error", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)]
)
def test_the_gaussian_levels_reach_the_least_error(bits: int, error: float) -> None:
    levels = gaussian_levels(bits).double()
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    nearest = (x[:, None] - levels).square().amin(-1)
    assert float((nearest * weight).sum() / weight.sum()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("bits, expected", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_turbo_loses_what_theory_says_whatever_the_channels(bits: int, expected: float) -> None:
    """Rotated vectors are nearly Gaussian even where two channels outweigh all others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 500, 128, generator=generator)
    x[..., :2] *= 30
    cache = KVCache([KVLayer(x.half(), x.half(), torch.arange(500))], 500)
    back = decode(Codec(f"turbo(bits={bits})").encode(cache)).layers[0].keys.float()
    lost = float((back - x).square().sum() / x.square().sum())
    plain = decode(Codec(f"int{bits}(group=0)").encode(cache)).layers[0].keys.float()
    assert lost < 2 * expected
    assert lost == pytest.approx(expected, rel=0.12) or lost < expected
    assert (plain - x)[..., 2:].square().sum() > 3 * (back - x)[..., 2:].square().sum()


def turbo_vectors(x: Tensor, outliers: float) -> list[tuple[Tensor, bool]]:
    """The channels [kv_heads, n] of each vector that `turbo` turns of x [kv_heads, tokens, head_dim]; whether outliers."""
    apart = round(outliers * x.shape[-1])
    order = np.argsort(-x.abs().sum(1).numpy(), axis=-1, kind="stable")
    cut = [(np.sort(order[:, :apart]), True), (np.sort(order[:, apart:]), False)]
    return [(torch.from_numpy(channels), outer) for channels, outer in cut if channels.size]


@pytest.mark.parametrize(
    "bits, outliers, extra", [(2, 0, 1), (4, 0, 1), (5, 0, 1), (4, 0.25, 1), (2, 0.4, 3)]
)
@pytest.mark.parametrize("name", CACHES)
def test_turbo_errs_by_its_cells_in_the_rotated_space(
    name: str, bits: int, outliers: float, extra: int
) -> None:
    """In the rotated space an element errs by half its cell, or by what it lies beyond the last level."""
    if name == "ragged" and outliers:
        pytest.skip("heads of unlike lengths are quantized as one")
    cache = cache_of(name)
    text = f"turbo(bits={bits}, outliers={outliers}, extra={extra})"
    for _, whole, whole_back in pairs(cache, decode(Codec(text).encode(cache))):
        for channels, outer in turbo_vectors(whole, outliers):
            where = channels[:, None].expand(-1, whole.shape[1], -1) if outliers else slice(None)
            x, back = (v.gather(-1, where) if outliers else v for v in (whole, whole_back))
            levels = gaussian_levels(bits + extra * outer).double()
            assert x.shape[-1] <= 256
            turn = rotation(x.shape[-1], 0).double()
            size = x.square().mean(-1, keepdim=True).sqrt()
            y, y_back = x @ turn.T, back @ turn.T
            inner = float(levels.diff().max()) / 2
            beyond = (y.abs() - size * float(levels[-1])).clamp_min(0)
            eps = torch.finfo(cache.dtype).eps
            # x̂ is rounded to 16 bits before it is turned: its rounding error's length bounds that of each coordinate
            slack = 4 * eps * (back.square().sum(-1, keepdim=True).sqrt() + size) + 1e-6
            assert bool(((y_back - y).abs() <= size * inner * (1 + eps) + beyond + slack).all())


def biased_keys(head_dim: int, count: int, bias: float, rotated: bool) -> KVCache:
    """Keys of which `count` channels of each head have a constant of `bias` added (at other places in each head), as a key
    projection with large biases makes them; turned by their positions or not.
    """
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 300, head_dim, generator=generator)
    for head in keys:
        head[:, torch.randperm(head_dim, generator=generator)[:count]] += bias
    if rotated:
        half = head_dim // 2
        angles = torch.arange(300)[:, None] * 10000.0 ** -(torch.arange(half) / half)
        a, b = keys[..., :half], keys[..., half:]
        keys = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
    return KVCache([KVLayer(keys.half(), values.half(), torch.arange(300))], 300)


def lost_of_keys(text: str, cache: KVCache) -> tuple[int, float, float]:
    """Bytes of the payload; the keys' mean square error; that of the channels without a bias (their median)."""
    payload = Codec(text).encode(cache)
    x = cache.layers[0].keys.float()
    error = (decode(payload).layers[0].keys.float() - x).square()
    quiet = x.abs().mean(1) < 2
    return len(payload), float(error.mean()), float(error.transpose(1, 2)[quiet].mean(1).median())


@pytest.mark.parametrize("head_dim, count", [(64, 4), (128, 4), (128, 2)])
@pytest.mark.parametrize("bias", [30.0, 100.0, 300.0])
def test_turbo_loses_less_than_int4_at_fewer_bits_where_key_biases_are_large(
    head_dim: int, count: int, bias: float
) -> None:
    """The other channels come back as if there were no such bias."""
    cache = biased_keys(head_dim, count, bias, rotated=True)
    size, error, of_others = lost_of_keys("turbo", cache)
    int4_size, int4_error, _ = lost_of_keys("int4", cache)
    assert size < int4_size and error < 0.5 * int4_error
    assert of_others == pytest.approx(0.0095, rel=0.15)  # Max's, of 16 levels


@pytest.mark.parametrize("head_dim, count", [(64, 4), (128, 4), (128, 2)])
@pytest.mark.parametrize("bias", [30.0, 100.0, 300.0])
def test_turbo_of_int4s_size_is_near_int4_where_key_biases_stay_constant(
    head_dim: int, count: int, bias: float
) -> None:
    """Constants are where `int4` is at its best: they are the ends of its groups' ranges, and those are exact."""
    cache = biased_keys(head_dim, count, bias, rotated=False)
    size, error, of_others = lost_of_keys("turbo(extra=2)", cache)
    int4_size, int4_error, _ = lost_of_keys("int4", cache)
    assert size < 1.01 * int4_size and error < 1.25 * int4_error
    assert of_others == pytest.approx(0.0095, rel=0.15)


def test_turbo_marks_the_channels_of_the_largest_mean_magnitude_in_each_head() -> None:
    """Where nothing but outliers get bits worth the name, they alone come back well."""
    cache = biased_keys(64, 4, 10.0, rotated=False)
    x = cache.layers[0].keys.double()
    back = decode(Codec("turbo(bits=1, outliers=0.0625, extra=7)").encode(cache)).layers[0].keys.double()
    for head, head_back in zip(x, back, strict=True):
        lost = (head - head_back).square().mean(0).sqrt()
        assert set(lost.argsort()[:4].tolist()) == set(head.abs().mean(0).argsort()[-4:].tolist())


def test_turbo_of_other_outliers_is_written_as_it_is_read() -> None:
    for text in ("turbo", "turbo(outliers=0)", "turbo(bits=3, outliers=0.125, extra=2, seed=5)"):
        assert str(Codec(text)) == text
    with pytest.raises(SpecError, match=r"outliers is 0\.6, but must be from 0 to 0\.5"):
        Codec("turbo(outliers=0.6)")


def test_turbo_keeps_more_of_a_model_with_large_key_biases_than_int4(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A Qwen2 of which one key channel of each head has a bias of a hundred times what the others hold."""
    shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights):
        if name.endswith("k_proj.bias"):
            for head in weights[name].view(2, 16):
                head[torch.randint(8, 16, (1,), generator=generator)] = 100.0
    save_file(weights, file, {"format": "pt"})
    model = load_model(str(tmp_path / "model"), threads=1)
    context = model.tokenize("The keeper wrote the code 4821 on a blue card, by the river. " * 8, start=True)
    cache = model.prefill(context, None).cache
    question, gold = (
        model.tokenize("What is the number?"),
        model.tokenize(" The number of the red door is 9036"),
    )
    reference = model.likelihood(question, gold, cache)

    def divergence(text: str) -> float:
        return mean_kl(reference, model.likelihood(question, gold, decode(Codec(text).encode(cache))))

    assert divergence("turbo") < divergence("int4")
    assert divergence("turbo(extra=2)") < 0.5 * divergence("turbo(outliers=0)")
