from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.models.kvcache import (
    EMPTY,
    KVCache,
    KVLayer,
    between,
    join,
    layers,
    seen_from,
    stack,
)


def layer(start: int, tokens: int, window: int | None = None) -> KVLayer:
    values = torch.arange(2 * tokens * 4, dtype=torch.float16).reshape(2, tokens, 4)
    return KVLayer(values, -values, torch.arange(start, start + tokens), window)


def test_sizes_count_two_bytes_an_element() -> None:
    cache = KVCache(
        [layer(0, 5), KVLayer(*(t.float() for t in (torch.ones(2, 3, 4),) * 2), torch.arange(3))], 5
    )
    assert cache.nbytes == (5 + 3) * 2 * 4 * 2 * 2
    assert (cache.tokens(0), cache.tokens(1)) == (5, 3)


def test_selecting_keeps_tokens_with_their_positions() -> None:
    kept = layer(10, 6).select(torch.tensor([1, 4]))
    assert kept.positions.tolist() == [11, 14]
    assert torch.equal(kept.keys, layer(10, 6).keys[:, [1, 4]])


def test_heads_may_keep_different_tokens() -> None:
    kept = layer(10, 6).select(torch.tensor([[0, 1], [3, 5]]))
    assert kept.positions.tolist() == [[10, 11], [13, 15]]
    assert torch.equal(kept.keys[1], layer(10, 6).keys[1, [3, 5]])
    assert torch.equal(kept.values[0], layer(10, 6).values[0, [0, 1]])
    assert kept.select(torch.tensor([1])).positions.tolist() == [[11], [15]]


def test_heads_may_keep_different_numbers_of_tokens() -> None:
    kept = layer(10, 6).select(torch.tensor([[-1, -1, 2], [1, 3, 5]]))
    assert kept.positions.tolist() == [[-1, -1, 12], [11, 13, 15]]
    assert kept.counts == [1, 3] and kept.tokens == 3
    assert kept.nbytes == 4 * (kept.head_dim + kept.values.shape[2]) * 2
    assert not kept.keys[0, :2].any() and torch.equal(kept.keys[0, 2], layer(10, 6).keys[0, 2])
    assert layer(10, 6).counts is None
    whole = join(KVCache([layer(0, 2)], 10), KVCache([kept], 16), KVCache([layer(16, 1)], 17)).layers[0]
    assert whole.positions.tolist() == [[-1, -1, 0, 1, 12, 16], [0, 1, 11, 13, 15, 16]]
    assert torch.equal(whole.keys[0, 2:4], layer(0, 2).keys[0])


@pytest.mark.parametrize(
    "kept",
    [[1, 0], [0, 0], [0, 6], [-1, 2], [[0, 1]], [[0, -1], [0, 1]], [[1, 0], [0, 1]], [[-2, 0], [0, 1]]],
)
def test_selecting_what_does_not_ascend_or_exist_is_refused(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="kept"):
        layer(0, 6).select(torch.tensor(kept))


def test_joining_makes_one_stretch() -> None:
    whole = join(KVCache([layer(0, 3)], 3), KVCache([layer(3, 4).select(torch.tensor([0, 2]))], 7))
    assert whole.length == 7
    assert whole.layers[0].positions.tolist() == [0, 1, 2, 3, 5]


def test_joining_with_differing_heads_makes_positions_per_head() -> None:
    ragged = layer(3, 4).select(torch.tensor([[0, 2], [1, 3]]))
    whole = join(KVCache([layer(0, 2)], 3), KVCache([ragged], 7))
    assert whole.layers[0].positions.tolist() == [[0, 1, 3, 5], [0, 1, 4, 6]]


def test_joining_what_overlaps_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        join(KVCache([layer(0, 3)], 3), KVCache([layer(2, 3)], 5))
    with pytest.raises(ValueError, match="window"):
        join(KVCache([layer(0, 3)], 3), KVCache([layer(3, 3, window=4)], 6))
    with pytest.raises(ValueError, match="layers"):
        join(KVCache([layer(0, 3)], 3), KVCache([layer(3, 3)] * 2, 6))


def test_slicing_counts_from_the_end_too() -> None:
    assert layer(10, 6).slice(-2).positions.tolist() == [14, 15]


def test_a_clone_shares_nothing() -> None:
    cache = KVCache([layer(0, 3)], 3)
    cache.clone().layers[0].keys.zero_()
    assert bool(cache.layers[0].keys.any())


@st.composite
def caches(draw: st.DrawFn) -> KVCache:
    """Of layers that hold any of 24 positions, all heads the same or each its own, some behind a window."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        held = st.lists(st.integers(0, 23), unique=True).map(sorted)
        heads = [draw(held)] * 2 if draw(st.booleans()) else [draw(held), draw(held)]
        most = max(map(len, heads))
        positions = torch.tensor([[EMPTY] * (most - len(h)) + h for h in heads]).view(2, most)
        keys = (positions[..., None] * 4 + torch.arange(4)).half().masked_fill((positions < 0)[..., None], 0)
        shared = heads[0] == heads[1] and draw(st.booleans())
        made.append(
            KVLayer(
                keys,
                keys[..., :2] + number * (positions >= 0)[..., None],
                positions[0] if shared else positions,
                draw(st.sampled_from([None, 6])),
            )
        )
    return KVCache(made, 24)


def assert_equal(one: KVCache, other: KVCache) -> None:
    assert one.length == other.length and len(one.layers) == len(other.layers)
    for first, second in zip(one.layers, other.layers, strict=True):
        assert first.window == second.window
        for name in ("keys", "values", "positions"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


@given(caches(), st.lists(st.integers(0, 24)))
def test_a_cache_cut_by_positions_and_joined_is_the_cache(cache: KVCache, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 24]
    parts = [between(cache, start, stop) for start, stop in itertools.pairwise(ends)]
    for part, (start, stop) in zip(parts, itertools.pairwise(ends), strict=True):
        assert part.length == stop
        for one, whole in zip(part.layers, cache.layers, strict=True):
            for head in range(2):
                found = [p for p in one.positions.expand(2, -1)[head].tolist() if p != EMPTY]
                assert found == [p for p in whole.positions.expand(2, -1)[head].tolist() if start <= p < stop]
    assert_equal(join(*parts), cache)


@given(caches(), st.data())
def test_a_cache_cut_by_layers_and_stacked_is_the_cache(cache: KVCache, data: st.DataObject) -> None:
    count = len(cache.layers)
    cuts = data.draw(st.sets(st.integers(1, count)))
    ends = sorted({0, *cuts, count})
    assert_equal(stack(*(layers(cache, start, stop) for start, stop in itertools.pairwise(ends))), cache)


@given(caches(), st.integers(0, 24))
def test_what_no_later_query_sees_goes_and_nothing_else(cache: KVCache, position: int) -> None:
    for one, whole in zip(seen_from(cache, position).layers, cache.layers, strict=True):
        for head in range(2):
            found = [p for p in one.positions.expand(2, -1)[head].tolist() if p != EMPTY]
            held = [p for p in whole.positions.expand(2, -1)[head].tolist() if p != EMPTY]
            assert found == [p for p in held if whole.window is None or p > position - whole.window]


def test_cuts_share_memory_with_the_cache() -> None:
    cache = KVCache([layer(0, 6), layer(0, 6, window=3)], 6)
    for part in (between(cache, 2, 6), layers(cache, 0, 1), seen_from(cache, 6)):
        for one in part.layers:
            assert one.keys.untyped_storage().data_ptr() in {
                whole.keys.untyped_storage().data_ptr() for whole in cache.layers
            }


def test_cuts_outside_a_cache_and_stacks_of_unlike_ones_are_refused() -> None:
    cache = KVCache([layer(0, 6)] * 2, 6)
    for start, stop in ((-1, 3), (4, 3), (0, 7)):
        with pytest.raises(ValueError, match="a cache that ends at 6"):
            between(cache, start, stop)
    for start, stop in ((-1, 1), (1, 1), (0, 3)):
        with pytest.raises(ValueError, match="a cache of 2 layers"):
            layers(cache, start, stop)
    with pytest.raises(ValueError, match="of one length"):
        stack(cache, KVCache([layer(0, 3)], 3))
    with pytest.raises(ValueError, match="of one length"):
        stack()
