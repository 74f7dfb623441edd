from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.models.attention import BLOCK, attend
from testbed.models.loading import load_model
from testbed.models.scores import attention_blocks, attention_sum
from tests.models import reference
from tests.tiny_models import FAMILIES

Tiny = Callable[[str], Path]

TEXT = "Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821."


def textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One query and head at a time, in double precision."""
    q_heads, new, _ = query.shape
    out = torch.empty(q_heads, new, value.shape[2], dtype=torch.float64)
    for head in range(q_heads):
        kv = head * key.shape[0] // q_heads
        held = positions.expand(key.shape[0], -1)[kv].tolist()
        for i in range(new):
            at = held[len(held) - new + i]
            seen = [j for j, p in enumerate(held) if p <= at and (window is None or p > at - window)]
            scores = key[kv, seen].double() @ query[head, i].double() * scaling
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[head, i] = scores.softmax(0) @ value[kv, seen].double()
    return out.float()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("new", [1, 5, 30])
@pytest.mark.parametrize("past", ["none", "whole", "with gaps", "by head"])
def test_attention_over_any_cache_equals_the_textbook(
    past: str, new: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.models.attention.BLOCK", 8)  # so that these lengths take several blocks
    generator = torch.Generator().manual_seed(new)
    before = {
        "none": torch.arange(0),
        "whole": torch.arange(20),
        "with gaps": torch.tensor([0, 1, 5, 9, 13, 14, 33, 34, 39]),
        "by head": torch.tensor([[0, 3, 9, 30, 33], [1, 2, 35, 36, 39]]),
    }[past]
    start = 20 if past == "whole" else 0 if past == "none" else 40
    tail = torch.arange(start, start + new)
    positions = torch.cat([before, tail.expand(*before.shape[:-1], -1)], -1)
    query = torch.randn(4, new, 16, generator=generator)
    key, value = torch.randn(2, 2, positions.shape[-1], 16, generator=generator)
    ours = attend(query[None], key[None], value[None], positions, 0.3, window, softcap)
    torch.testing.assert_close(
        ours[0], textbook(query, key, value, positions, 0.3, window, softcap), atol=2e-6, rtol=2e-5
    )


@pytest.mark.parametrize("past", [0, 9])
def test_attention_at_once_as_a_gpu_is_given_it_is_the_same(
    past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch does with it on the processor, that is: it makes the mask there."""
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(1, 4, 30, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, past + 30, 16, generator=generator)
    about = (query, key, value, torch.arange(past + 30), 0.3)
    by_blocks = attend(*about)
    monkeypatch.setattr("testbed.models.attention._flash", lambda *tensors: True)
    torch.testing.assert_close(attend(*about), by_blocks, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 100, 4000])
@pytest.mark.parametrize("past", [0, 50])
def test_masks_of_a_long_pass_are_no_matrix_of_its_tokens(past: int, window: int | None) -> None:
    tokens, masks = 8192, dict[Any, Any]()
    query, key = torch.zeros(1, 1, tokens, 1), torch.zeros(1, 1, past + tokens, 1)
    for _ in range(2):  # layers, which share them
        attend(query, key, key, torch.arange(past + tokens), 1.0, window, None, masks)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for made in masks.values()
        for tensor in (made if isinstance(made, tuple) else [made])
        if isinstance(tensor, torch.Tensor)
    }
    assert sum(held.values()) <= 6 * BLOCK * (past + tokens) < 0.2 * tokens**2


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("new", [1, 5, 30])
def test_heads_that_hold_different_numbers_of_tokens_see_only_what_they_hold(
    new: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.models.attention.BLOCK", 8)
    generator = torch.Generator().manual_seed(new)
    before = torch.tensor([[-1, -1, -1, 30, 39], [1, 2, 35, 36, 38], [-1, 0, 36, 37, 38]])
    tail = torch.arange(40, 40 + new)
    positions = torch.cat([before, tail.expand(3, -1)], -1)
    query = torch.randn(6, new, 16, generator=generator)
    key, value = torch.randn(2, 3, positions.shape[-1], 16, generator=generator)
    ours = attend(query[None], key[None], value[None], positions, 0.3, window, softcap)[0]
    for head in range(3):
        held = positions[head] >= 0
        asked = slice(2 * head, 2 * head + 2)
        alone = key[head : head + 1, held], value[head : head + 1, held], positions[head, held]
        expected = textbook(query[asked], *alone, 0.3, window, softcap)
        torch.testing.assert_close(ours[asked], expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("ragged", [False, True])
def test_what_each_key_gets_is_summed_on_the_way_and_changes_no_output(
    ragged: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is 1 for one key and 0 for all others makes the output the weight of that key."""
    monkeypatch.setattr("testbed.models.attention.SUMMED_BLOCK", 8)
    generator = torch.Generator().manual_seed(3)
    before = torch.tensor([[-1, -1, 9, 30, 33], [1, 2, 35, 36, 39]]) if ragged else torch.arange(35, 40)
    positions = torch.cat([before, torch.arange(40, 60).expand(*before.shape[:-1], -1)], -1)
    query = torch.randn(4, 20, 16, generator=generator)
    key = torch.randn(2, 25, 16, generator=generator)
    value = torch.eye(25).expand(2, -1, -1)
    sums = torch.zeros(2, 25)
    ours = attend(query[None], key[None], value[None], positions, 0.3, window, softcap, None, sums)[0]
    plain = attend(query[None], key[None], value[None], positions, 0.3, window, softcap)[0]
    torch.testing.assert_close(ours, plain, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(sums, plain.unflatten(0, (2, 2)).mean(1).sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_sums_equal_the_weights_that_transformers_returns(tiny_model: Tiny, family: str) -> None:
    model = load_model(str(tiny_model(family)), threads=1, cache_dtype=torch.float32)
    ids = model.tokenize(TEXT, start=True)
    network = reference.reference_network(tiny_model(family), "eager")
    with torch.no_grad():
        weights = network(torch.tensor([ids]), output_attentions=True).attentions
    count = 5
    result = model.prefill(ids, None, queries=count)
    for layer, (held, queries) in enumerate(zip(result.cache.layers, result.queries, strict=True)):
        if held.tokens < len(ids):
            continue  # a sliding layer gave up keys that these queries saw
        total = attention_sum(
            queries,
            model.attended(layer, held)[0],
            query_positions=result.query_positions,
            key_positions=held.positions,
            scaling=model.scaling(layer),
            softcap=model.softcap(layer),
            window=model.window(layer),
            block=2,
        )
        expected = weights[layer][0, :, -count:].sum(1).reshape(len(total), -1, len(ids)).mean(1)
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


def test_probabilities_come_in_blocks_and_sum_to_one_over_what_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 10, 8, generator=generator)
    keys = torch.randn(2, 6, 8, generator=generator)
    positions = torch.tensor([[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]])
    at = torch.arange(10)
    blocks = list(
        attention_blocks(
            queries, keys, query_positions=at, key_positions=positions, scaling=0.5, window=3, block=4
        )
    )
    assert [(start, stop) for start, stop, _ in blocks] == [(0, 4), (4, 8), (8, 10)]
    whole = torch.cat([probabilities for *_, probabilities in blocks], 1)
    for head in range(4):
        for q in range(10):
            seen = [(p <= q) and (p > q - 3) for p in positions[head // 2].tolist()]
            assert (whole[head, q] > 0).tolist() == seen
            assert float(whole[head, q].sum()) == pytest.approx(1.0 if any(seen) else 0.0, abs=1e-6)


def test_sixteen_bit_keys_score_as_their_values_in_full_precision() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = (
        torch.randn(4, 3, 8, generator=generator),
        torch.randn(2, 9, 8, generator=generator).half(),
    )
    at, positions = torch.arange(6, 9), torch.arange(9)
    ours = attention_sum(queries, keys, query_positions=at, key_positions=positions, scaling=0.5)
    full = attention_sum(queries, keys.float(), query_positions=at, key_positions=positions, scaling=0.5)
    assert ours.dtype == torch.float32 and torch.equal(ours, full)
