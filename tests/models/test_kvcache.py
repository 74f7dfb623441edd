from __future__ import annotations

import pytest
import torch

from testbed.models.kvcache import KVCache, KVLayer, join


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
