"""Selectors beside their papers' formulas, written out in NumPy token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Evidence
from tests.codecs.test_selectors import CONTEXT, HEADS, make_evidence

Array = npt.NDArray[np.float64]


def selector(text: str) -> Any:
    return Codec(text).selector


def scored(text: str, evidence: Evidence, layer: int = 0) -> Array:
    return np.asarray(selector(text).scores(evidence, layer).double().numpy())


def kept(text: str, evidence: Evidence, layer: int = 0) -> list[list[int]]:
    """What each head keeps of a layer."""
    index = Codec(text).select(evidence).layers[layer]
    assert index is not None
    return [[t for t in row if t >= 0] for row in index.expand(HEADS, -1).tolist()]


def keys_and_values(evidence: Evidence, layer: int = 0) -> tuple[Array, Array]:
    held = evidence.cache.layers[layer]
    return held.keys.double().numpy(), held.values.double().numpy()


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def best(scores: Array, count: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


@pytest.mark.parametrize("layer", [0, 2])
def test_lagkv_keeps_the_widest_spread_of_each_partition_beside_the_next(layer: int) -> None:
    evidence, sinks, lag = make_evidence(), 4, 10
    keys, values = keys_and_values(evidence, layer)
    # 60 tokens: sinks, 5 partitions of 10 of which the last has none behind it, and 6 behind these
    scored_parts = 4
    always = {*range(sinks), *range(sinks + scored_parts * lag, CONTEXT)}
    share = 5  # of each partition
    budget = len(always) + scored_parts * share
    found = kept(f"lagkv@{budget / CONTEXT:.6f}(sinks={sinks}, lag={lag})", evidence, layer)
    for head in range(HEADS):
        expected = set(always)
        for p in range(scored_parts):
            start = sinks + p * lag
            worth = np.zeros(lag)
            for x in (keys[head], values[head]):
                behind = x[start + lag : start + 2 * lag]
                low, high = behind.min(0), behind.max(0)
                worth += softmax(
                    np.array([((x[start + i] - low) / (high - low)).std(ddof=1) for i in range(lag)])
                )
            expected |= {start + i for i in best(worth, share)}
        assert set(found[head]) == expected


def test_lagkv_of_a_context_of_less_than_two_partitions_keeps_sinks_and_the_last_tokens() -> None:
    assert kept("lagkv@0.5(lag=40)", make_evidence()) == [[0, 1, 2, 3, *range(34, 60)]] * HEADS


def test_lagkv_takes_channels_that_do_not_change() -> None:
    evidence = make_evidence()
    evidence.cache.layers[0].keys.fill_(2)
    evidence.cache.layers[0].values.fill_(-1)
    assert np.isfinite(scored("lagkv@0.5(lag=10)", evidence)).all()
