"""Differences between tokens: how far a decoded element may be off, derived here for open and closed loops; what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache, KVLayer
from tests.codecs.caches import CACHES, cache_of, make_cache

ANCHOR = 4


def half_step(low: Tensor, high: Tensor, levels: int, eps: float, tiny: float) -> Tensor:
    """The most by which a number within [low, high] is off: half a step, and what 16 bits do to scale and zero point.

    The scale is off by `eps` of itself at most, which the largest multiple of it makes `levels` times; the zero point, which is
    in 16 bits whatever the difference is in, by `eps` of itself.
    """
    step = (high - low) / levels
    return step / 2 + (levels + 1) * (eps * step + tiny) + eps * torch.maximum(low.abs(), high.abs()) + tiny


def group_extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """For each element the least and the largest of its group of channels."""
    low, high = [], []
    for chunk in x.split(group, -1):
        low.append(chunk.amin(-1, keepdim=True).expand_as(chunk))
        high.append(chunk.amax(-1, keepdim=True).expand_as(chunk))
    return torch.cat(low, -1), torch.cat(high, -1)


def bounds(x: Tensor, levels: int, group: int, loop: str, order: str, dtype: torch.dtype) -> Tensor:
    """x in float64, [heads, tokens, dim] -> the bound of each element's error.

    closed: d_t = x_t - p̂_t, whose group spans what x_t - p_t spans and the largest error of p̂_t to either side; only the
    error of d̂_t is left. open: d_t = x_t - p_t exactly, and the error of p̂_t is added to that of d̂_t.
    """
    info = torch.finfo(dtype)
    eps, tiny = info.eps, info.smallest_normal * info.eps + torch.finfo(torch.float32).tiny
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        now = x[:, t]
        if t % ANCHOR == 0:
            out[:, t] = half_step(*group_extremes(now, group), levels, eps, tiny)
            continue
        before = t - t % ANCHOR if order == "anchor" else t - 1
        low, high = group_extremes(now - x[:, before], group)
        if loop == "closed":
            off = group_extremes(out[:, before], group)[1]
            out[:, t] = half_step(low - off, high + off, levels, eps, tiny)
        else:
            out[:, t] = half_step(low, high, levels, eps, tiny) + out[:, before]
    # The sums are in float32, and rounded once more to 16 bits at the end.
    return out + eps * (x.abs() + out) + tiny


@pytest.mark.parametrize("loop, order", [*itertools.product(["open", "closed"], ["anchor", "consecutive"])])
@pytest.mark.parametrize("text", ["int4", "int8(symmetric=false, group=32)", "int3(group=16)"])
@pytest.mark.parametrize("name", CACHES)
def test_decoded_differences_are_within_the_derived_bound(
    name: str, text: str, loop: str, order: str
) -> None:
    cache = cache_of(name)
    codec = Codec(f"delta(anchor={ANCHOR}, loop={loop}, order={order})+{text}")
    quantizer = codec.quantizer
    levels, group = 2**quantizer.width - 1, quantizer.group  # type: ignore[attr-defined]
    for ours, theirs in zip(decode(codec.encode(cache)).layers, cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            if not b.numel():
                continue
            bound = bounds(b.double(), levels, group, loop, order, b.dtype)
            assert bool(((a.double() - b.double()).abs() <= bound).all())


@pytest.mark.parametrize("name", CACHES)
def test_differences_take_the_bytes_of_what_they_replace(name: str) -> None:
    cache = cache_of(name)
    for text in ("int4", "int8", "int3(group=16)"):
        more = len(Codec(f"delta+{text}").encode(cache)) - len(Codec(text).encode(cache))
        assert 0 <= more <= 16  # its name


@pytest.mark.parametrize("order", ["anchor", "consecutive"])
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_differences_are_undone(order: str, loop: str) -> None:
    for name, anchor in itertools.product(CACHES, (2, 10)):
        cache = cache_of(name)
        text = f"delta(anchor={anchor}, loop={loop}, order={order})+fp16"
        decoded = decode(Codec(text).encode(cache))
        for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                # 16 bits of a difference are off by half a unit in its last place; open loops add `anchor` of them up
                unit = torch.finfo(b.dtype).eps * (2 * b.double().abs().max() if b.numel() else 1)
                assert bool(
                    ((a.double() - b.double()).abs() <= unit * (anchor if loop == "open" else 2)).all()
                )


def smooth() -> Tensor:
    """Tokens that change slowly, as a walk."""
    steps = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(1))
    return (0.1 * steps.cumsum(1) + 3).half()


@pytest.mark.parametrize("order", ["anchor", "consecutive"])
def test_a_closed_loop_is_as_exact_as_the_quantizer_on_each_difference(order: str) -> None:
    """|x̂ - x| ≤ s / 2 where s is the step of the difference's group: at most the largest range of any difference / 15."""
    x = smooth()

    def error(text: str) -> Tensor:
        payload = Codec(text).encode(KVCache([KVLayer(x, x, torch.arange(x.shape[1]))], x.shape[1]))
        return (decode(payload).layers[0].keys.double() - x.double()).abs()

    closed, open_loop = (error(f"delta(loop={loop}, order={order})+int4") for loop in ("closed", "open"))
    later = torch.arange(x.shape[1]) % 10 != 0
    assert closed[:, later].mean() < open_loop[:, later].mean()
    assert closed.mean() < error("int4").mean()


def test_a_closed_loop_refuses_a_quantizer_that_mixes_tokens() -> None:
    with pytest.raises(CodecError, match="codes each token by itself"):
        Codec("delta+int4(axis=channel)").encode(make_cache("grouped"))
    Codec("delta(loop=open)+int4(axis=channel)").encode(make_cache("grouped"))


def test_bytes_beside_differences_are_refused() -> None:
    codec = Codec("delta+int4")
    with pytest.raises(PayloadError):
        assert codec.transform is not None
        codec.transform.decode(make_cache("grouped").to(dtype=torch.float32), b"x")
