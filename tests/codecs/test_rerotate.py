"""Rerotation: kept keys stand one behind the other, turned as complex numbers are and as the model itself turns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Kept, Needs, gather, prefill_for
from testbed.models.kvcache import EMPTY, KVCache
from testbed.models.loading import load_model
from testbed.models.rope import Rope
from tests.codecs.test_selectors import CONTEXT, DIM, PREFIX, make_evidence

ROPE = Rope(tuple(10000.0 ** (-i / 8) for i in range(8)), tuple(range(8)), 8)
END = PREFIX + CONTEXT


def knowing(evidence: Evidence) -> KVCache:
    layers = [replace(layer, rope=ROPE).to(dtype=torch.float16) for layer in evidence.cache.layers]
    return KVCache(layers, evidence.cache.length)


def turned(keys: np.ndarray, by: int) -> np.ndarray:
    """Keys [dim], halves paired, turned by so many positions: pairs as complex numbers."""
    numbers = keys[:8] + 1j * keys[8:]
    moved = numbers * np.exp(1j * by * np.array(ROPE.frequencies))
    return np.concatenate([moved.real, moved.imag])


@pytest.mark.parametrize("by", ["snapkv", "q2c", "keydiff"])
@pytest.mark.parametrize("scope", ["head", "global"])
def test_kept_keys_are_turned_to_positions_that_end_with_the_contexts(by: str, scope: str) -> None:
    evidence, codec = make_evidence(), Codec(f"rerotate@0.3(by={by}, scope={scope})")
    plain = Codec(f"{by}@0.3(scope={scope})").select(evidence)
    kept, cache = codec.select(evidence), knowing(evidence)
    assert all(
        a is b is None or torch.equal(a, b)  # type: ignore[arg-type]
        for a, b in zip(kept.layers, plain.layers, strict=True)
    )
    found = decode(codec.encode(cache, kept))
    assert found.length == END
    for layer, full, index in zip(found.layers, cache.layers, kept.layers, strict=True):
        if index is None:  # a sliding window's layer travels whole
            assert torch.equal(layer.positions, full.positions)
            assert torch.equal(layer.keys, full.keys)
            continue
        assert layer.positions.tolist() == list(range(END - 18, END))
        for h, row in enumerate(index.expand(full.kv_heads, -1).tolist()):
            expected = [
                turned(full.keys[h, t].double().numpy(), END - 18 + j - (PREFIX + t))
                for j, t in enumerate(row)
            ]
            np.testing.assert_allclose(layer.keys[h].double().numpy(), np.stack(expected), atol=4e-3)
            assert torch.equal(layer.values[h], full.values[h, row])


def test_what_is_turned_is_what_the_models_own_prefill_has_there(tiny_model: Callable[[str], Path]) -> None:
    """A first layer's keys depend on token and position alone."""
    model = load_model(str(tiny_model("llama")), threads=1)
    ids = [(7 * i) % 50 + 3 for i in range(40)]
    codec = Codec("rerotate@0.25(by=keydiff, scope=global)")
    context = prefill_for(model, codec.needs, ids, None)
    kept = codec.select(gather(model, codec.needs, None, context, []))
    found = decode(codec.encode(model.knowing_ropes(context.cache), kept))
    chosen = kept.layers[0]
    assert chosen is not None
    own = model.prefill([*ids[:30], *(ids[t] for t in chosen.tolist())], None).cache
    torch.testing.assert_close(
        found.layers[0].keys.float(), own.layers[0].keys[:, 30:].float(), atol=4e-3, rtol=4e-3
    )
    assert found.layers[0].positions.tolist() == own.layers[0].positions[30:].tolist()


@given(st.lists(st.sets(st.integers(0, CONTEXT - 1), min_size=1, max_size=20), min_size=2, max_size=2))
def test_heads_of_different_numbers_all_end_with_the_context(rows: list[set[int]]) -> None:
    most = max(map(len, rows))
    index = torch.tensor([[EMPTY] * (most - len(row)) + sorted(row) for row in rows])
    cache = knowing(make_evidence())
    moved = Kept((index, None, None), CONTEXT, together=True).apply(cache).layers[0]
    for h, row in enumerate(rows):
        where = moved.positions.expand(2, -1)[h]
        assert where[where != EMPTY].tolist() == list(range(END - len(row), END))
        for j, t in enumerate(sorted(row)):
            expected = turned(cache.layers[0].keys[h, t].double().numpy(), END - len(row) + j - PREFIX - t)
            place = most - len(row) + j
            np.testing.assert_allclose(moved.keys[h, place].double().numpy(), expected, atol=4e-3)


def test_a_cache_that_does_not_know_its_rotation_is_refused() -> None:
    evidence, codec = make_evidence(), Codec("rerotate@0.5")
    assert codec.undoes_rope and codec.needs == Needs(context_queries=32)
    with pytest.raises(CodecError, match="how they were turned is not known"):
        codec.encode(evidence.cache.to(dtype=torch.float16), codec.select(evidence))
    assert codec.select(evidence).digest() != Codec("snapkv@0.5").select(evidence).digest()
    assert 2 * len(ROPE.frequencies) == DIM
