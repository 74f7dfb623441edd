"""KVQuant, and the rotary embedding that it undoes."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from testbed.codecs.codec import Codec, decode
from testbed.codecs.quantize.kvquant import fitted_levels, normal_levels
from testbed.codecs.transform.unrotated import Unrotated
from testbed.errors import PayloadError
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.rope import Rope
from tests.codecs.caches import CACHES, cache_of, make_cache


def turned_one_by_one(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """The definition: each pair as a complex number, times e^(i · position · frequency)."""
    result = x.double().clone()
    for pair, frequency in zip(rope.first, rope.frequencies, strict=True):
        number = torch.complex(x[..., pair].double(), x[..., pair + rope.apart].double())
        number = number * torch.polar(torch.ones(()).double(), positions.double() * frequency)
        result[..., pair], result[..., pair + rope.apart] = number.real, number.imag
    return result


def default_rope(
    head_dim: int, theta: float = 10000.0, turned: int | None = None, interleaved: bool = False
) -> Rope:
    """The usual frequencies theta^(-2i/d) over the first `turned` elements (None: all) of a head."""
    turned = head_dim if turned is None else turned
    pairs = turned // 2
    frequencies = tuple(theta ** (-2 * i / turned) for i in range(pairs))
    first = tuple(2 * i if interleaved else i for i in range(pairs))
    return Rope(frequencies, first, 1 if interleaved else pairs)


ROPES = {
    "halves": default_rope(16),
    "neighbours": default_rope(16, interleaved=True),
    "the first quarter": default_rope(16, theta=500_000.0, turned=4),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_turning_is_the_complex_product_and_turning_back_undoes_it(name: str, per_head: bool) -> None:
    rope = ROPES[name]
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40, 40 + 9 * 200, 200)
    if per_head:
        positions = torch.stack([positions, positions + 7])
    turned = rope.turn(x, positions)
    assert torch.allclose(turned.double(), turned_one_by_one(x, positions, rope), atol=2e-3)
    assert torch.allclose(rope.turn(turned, positions, back=True), x, atol=1e-5)
    assert float((turned - x).abs().max()) > 0.5


def rotated_cache(tokens: int = 300) -> tuple[KVCache, KVCache]:
    """Keys with steady channels before their embedding, and the same without the knowledge of it."""
    generator = torch.Generator().manual_seed(3)
    rope = default_rope(64)
    positions = torch.arange(5, 5 + tokens)
    offset = 6 * torch.randn(2, 1, 64, generator=generator)
    keys = rope.turn(offset + torch.randn(2, tokens, 64, generator=generator), positions).half()
    values = torch.randn(2, tokens, 64, generator=generator).half()
    knowing = KVLayer(keys, values, positions, None, rope)
    return KVCache([knowing], 5 + tokens), KVCache([KVLayer(keys, values, positions)], 5 + tokens)


def test_keys_are_quantized_before_their_embedding_where_it_is_known() -> None:
    knowing, blind = rotated_cache()
    text = "kvquant(outliers=0)"

    def error(cache: KVCache) -> float:
        back = decode(Codec(text).encode(cache)).layers[0].keys
        return float((back.float() - cache.layers[0].keys.float()).square().mean())

    assert error(knowing) < 0.25 * error(blind)  # slow pairs hardly turn within 300 tokens
    assert 0 < len(Codec(text).encode(knowing)) - len(Codec(text).encode(blind)) < 300


def test_pruned_heads_are_turned_by_the_positions_they_kept() -> None:
    knowing, _ = rotated_cache()
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(300, generator=generator)[:80].sort().values for _ in range(2)])
    pruned = knowing.select([kept])
    back = decode(Codec("kvquant(bits=8, outliers=0)").encode(pruned)).layers[0]
    assert torch.equal(back.positions, pruned.layers[0].positions)
    assert float((back.keys.float() - pruned.layers[0].keys.float()).abs().max()) < 0.25


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("bits, outliers", [(3, 0.01), (2, 0.1)])
def test_levels_are_never_worse_than_a_uniform_grid_and_outliers_are_exact(
    name: str, bits: int, outliers: float
) -> None:
    """Lloyd's iteration starts from the uniform grid and never raises the mean square error.

    The grid's own is at most (half a step)² of each vector, whose range is without its outliers.
    """
    cache = cache_of(name)
    eps = torch.finfo(cache.dtype).eps
    decoded = decode(Codec(f"kvquant(bits={bits}, outliers={outliers})").encode(cache))
    for ours, theirs in zip(decoded.layers, cache.layers, strict=True):
        for kind in ("keys", "values"):
            x, back = getattr(theirs, kind).double(), getattr(ours, kind).double()
            if not x.numel():
                continue
            if kind == "keys":
                x, back = (t.transpose(1, 2).flatten(0, 1) for t in (x, back))
            else:
                x, back = (t.transpose(0, 1).flatten(1, 2) for t in (x, back))
            apart = round(outliers * x.shape[1])
            far = (x - x.mean(1, keepdim=True)).abs()
            cut = (
                far.sort(1).values[:, x.shape[1] - apart - 1].unsqueeze(1)
            )  # the farthest that is no outlier
            inside = far <= cut * (1 + 1e-5)
            assert bool((back == x)[far > cut * (1 + 1e-5)].all())
            low = x.masked_fill(~inside, torch.inf).amin(1, keepdim=True)
            high = x.masked_fill(~inside, -torch.inf).amax(1, keepdim=True)
            half_step = (high - low) / (2**bits - 1) / 2
            # 16 bits: the middle, s and the levels as they are sent, and x̂ itself
            slack = 4 * eps * x.abs().amax(1, keepdim=True)
            scale = (high - low) / 2 + slack
            error = ((back - x) / scale)[inside]
            allowed = ((half_step + slack) / scale).expand_as(x)[inside]
            assert float(error.square().mean()) <= float(allowed.square().mean()) * 1.02
            assert bool(((back - x).abs() <= 2 * scale + slack)[inside].all())


def test_fitted_levels_find_clusters_and_stay_in_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([-0.9, -0.1, 0.05, 0.7])
    u = centres[torch.randint(0, 4, (20_000,), generator=generator)] + 0.005 * torch.randn(
        20_000, generator=generator
    )
    assert fitted_levels(u.clamp(-1, 1), 2).tolist() == pytest.approx(centres.tolist(), abs=0.01)
    assert fitted_levels(torch.tensor([0.3]), 3).abs().max() <= 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_normal_levels_ascend_symmetrically_to_one(bits: int) -> None:
    levels = normal_levels(bits)
    assert len(levels) == 2**bits
    assert bool((levels.diff() > 0).all())
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
    assert float(levels[-1]) == 1.0


@given(st.binary(max_size=200))
def test_any_bytes_are_an_embedding_or_an_error(data: bytes) -> None:
    cache = make_cache("odd dimensions")
    try:
        Unrotated().decode(cache, data)
    except PayloadError as error:
        assert "\n" not in str(error)


numbers = st.integers(-2, 20) | st.just(2**40)


@given(
    st.lists(st.tuples(st.binary(max_size=12), st.lists(numbers, max_size=3), numbers), max_size=3),
    st.lists(numbers, max_size=3),
)
def test_forged_embeddings_are_refused_or_turn_within_the_head(
    kinds: list[object], layers: list[int]
) -> None:
    cache = make_cache("odd dimensions").to(dtype=torch.float32)
    try:
        turned = Unrotated().decode(cache, msgspec.msgpack.encode([kinds, layers]))
    except PayloadError:
        return
    assert [layer.keys.shape for layer in turned.layers] == [layer.keys.shape for layer in cache.layers]
