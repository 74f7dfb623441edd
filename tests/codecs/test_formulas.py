"""Selectors beside their papers' formulas, written out in NumPy token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Evidence
from testbed.errors import SpecError
from testbed.models.rotary import Rotation
from tests.codecs.test_selectors import (
    CONTEXT,
    DIM,
    GROUP,
    HEADS,
    PREFIX,
    QUESTION,
    attention,
    make_evidence,
)

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


FREQUENCIES = 0.3 ** np.arange(DIM // 2)


def turning() -> Evidence:
    """Evidence whose keys were turned: halves of a head together, by `FREQUENCIES`."""

    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = positions[:, None].double() * torch.from_numpy(FREQUENCIES)
        return turned.cos().float(), turned.sin().float()

    half = DIM // 2
    evidence = make_evidence()
    evidence.rotation = lambda layer: Rotation(angles, slice(0, half), slice(half, DIM), DIM)
    return evidence


def turned_back(keys: Array, first: int) -> Array:
    """Keys [heads, tokens, d] as they were before they were turned to the positions from `first` on, as complex numbers."""
    half = DIM // 2
    angle = np.arange(first, first + keys.shape[1])[:, None] * FREQUENCIES
    plain = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(-1j * angle)
    return np.concatenate([plain.real, plain.imag], -1)


def leverage_of(x: Array) -> Array:
    """The diagonal of the ridge regression's hat matrix, [tokens], by the singular values."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return np.asarray((u**2 * (s**2 / (s**2 + 0.01))).sum(1))


@pytest.mark.parametrize("layer", [0, 2])
def test_leverage_is_the_hat_matrix_of_the_keys_before_their_rotation(layer: int) -> None:
    evidence = turning()
    plain = turned_back(keys_and_values(evidence, layer)[0], PREFIX)
    expected = np.stack([leverage_of(head) for head in plain])
    np.testing.assert_allclose(scored("leverage@0.5", evidence, layer), expected, atol=1e-5)
    assert [set(row) for row in kept("leverage@0.25", evidence, layer)] == [best(row, 15) for row in expected]


def test_leverage_ranks_fewer_tokens_than_a_key_has_elements() -> None:
    evidence = make_evidence(context=6)
    evidence.rotation = turning().rotation
    assert [len(row) for row in kept("leverage@0.5", evidence)] == [3, 3]


def z(x: Array) -> Array:
    return np.asarray((x - x.mean()) / x.std())


@pytest.mark.parametrize("layer", [0, 2])
def test_compactor_adds_leverage_to_what_each_stretch_pays_to_itself_in_both_directions(layer: int) -> None:
    evidence, sinks, last, chunk, blend = turning(), 3, 2, 20, 0.7
    keys, values = keys_and_values(evidence, layer)
    inside = CONTEXT - sinks - last
    assert evidence.context_queries is not None
    queries = evidence.context_queries[layer].double().numpy()[:, sinks : sinks + inside]
    inner_keys, inner_values = keys[:, sinks : sinks + inside], values[:, sinks : sinks + inside]
    paid = np.zeros((HEADS, inside))
    for head, start in itertools.product(range(HEADS * GROUP), range(0, inside, chunk)):
        stretch = slice(start, start + chunk)
        logits = queries[head, stretch] @ inner_keys[head // GROUP, stretch].T * evidence.scaling(layer)
        if (cap := evidence.softcap(layer)) is not None:
            logits = cap * np.tanh(logits / cap)
        paid[head // GROUP, stretch] += softmax(logits).sum(0) / GROUP
    weighed = np.pad(paid * np.linalg.norm(inner_values, axis=-1), ((0, 0), (1, 1)))
    smooth = (weighed[:, :-2] + weighed[:, 1:-1] + weighed[:, 2:]) / 3
    plain = turned_back(keys, PREFIX)[:, sinks : sinks + inside]
    expected = z(smooth) + blend * z(np.stack([leverage_of(head) for head in plain]))
    text = f"compactor@0.5(sinks={sinks}, last={last}, chunk={chunk}, blend={blend})"
    np.testing.assert_allclose(
        scored(text, evidence, layer)[:, sinks : sinks + inside], expected, atol=1e-4, rtol=1e-4
    )
    for row, scores in zip(kept(text, evidence, layer), expected, strict=True):
        assert set(row) == {0, 1, 2, 58, 59} | {sinks + t for t in best(scores, 25)}


@pytest.mark.parametrize("layer", [0, 2])
def test_finch_keeps_an_equal_share_of_each_stretch_by_the_question(layer: int) -> None:
    evidence = make_evidence()
    assert evidence.question_queries is not None and evidence.question_query_positions is not None
    weights = attention(
        evidence, layer, evidence.question_queries[layer], evidence.question_query_positions
    ).numpy()
    seen = np.arange(PREFIX + CONTEXT + 1, PREFIX + CONTEXT + QUESTION + 1)
    worth = (weights * seen[:, None]).mean(1).reshape(HEADS, GROUP, CONTEXT).mean(1)
    found = kept("finch@0.4(chunk=20)", evidence, layer)
    for head in range(HEADS):
        expected = {start + t for start in (0, 20, 40) for t in best(worth[head, start : start + 20], 8)}
        assert set(found[head]) == expected


def test_simlayer_keeps_all_of_the_least_lazy_layer_and_the_ends_of_the_others() -> None:
    evidence = make_evidence()
    assert evidence.context_queries is not None and evidence.context_query_positions is not None
    asking = replace(evidence, question_cache=None)
    lazy = {}
    for layer in (0, 2):
        paid = attention(
            asking, layer, evidence.context_queries[layer][:, -2:], evidence.context_query_positions[-2:]
        ).numpy()
        lazy[layer] = (paid[..., :3].sum(-1) + paid[..., -9:].sum(-1)).mean()
        found = selector("simlayer@0.7(sinks=3, last=9, observers=2)").lazy(evidence, layer)
        assert found == pytest.approx(lazy[layer], abs=1e-6)
    idle = max(lazy, key=lambda layer: lazy[layer])
    # 84 places in two layers: 60 are all of one, and leave 24 to the other, of at least 12
    text = "simlayer@0.7(sinks=3, last=9, observers=2)"
    assert kept(text, evidence, idle) == [[0, 1, 2, *range(39, 60)]] * HEADS
    assert kept(text, evidence, 2 - idle) == [[*range(60)]] * HEADS
    # 66 leave 6 to the other, which are too few
    few = "simlayer@0.55(sinks=3, last=9)"
    assert kept(few, evidence, 0) == kept(few, evidence, 2) == [[0, 1, 2, *range(30, 60)]] * HEADS


def wrapped(text: str) -> Evidence:
    """Evidence for one layer's lists, all of it."""
    return turning() if "compactor" in text or "leverage" in text else make_evidence()


@pytest.mark.parametrize(
    "by", ["q2c", "h2o", "keynorm", "keydiff", "lagkv", "leverage", "compactor", "finch"]
)
def test_chunks_are_kept_whole_by_the_mean_of_any_selectors_scores(by: str) -> None:
    evidence = wrapped(by)
    text = f"chunk@0.4(by={by}, size=8)"
    always = set(selector(text).always(CONTEXT, 24))
    scores = scored(f"{by}@0.4", evidence).mean(0)
    means = [scores[start : start + 8].mean() for start in range(0, CONTEXT, 8)]
    order = [
        t for chunk in np.argsort(-np.array(means), kind="stable") for t in range(8 * chunk, 8 * chunk + 8)
    ]
    rest = [t for t in order if t < CONTEXT and t not in always]
    forced = list(dict.fromkeys(selector(text).always(CONTEXT, 24)))[:24]
    assert kept(text, evidence) == [sorted([*forced, *rest[: 24 - len(forced)]])] * HEADS


@pytest.mark.parametrize("by", ["q2c", "keydiff", "finch"])
def test_heads_share_a_layers_budget_by_any_selectors_scores(by: str) -> None:
    evidence = make_evidence()
    scores = scored(f"{by}@0.5", evidence)
    forced = set(selector(f"{by}@0.5").always(CONTEXT, 30))
    ranked = sorted(
        itertools.product(range(HEADS), range(CONTEXT)),
        key=lambda place: (place[1] not in forced, -scores[place]),
    )
    expected = [sorted(t for h, t in ranked[: HEADS * 30] if h == head) for head in range(HEADS)]
    assert kept(f"perhead@0.5(by={by}, floor=0)", evidence) == expected


def test_perhead_is_adaptive_and_perlayer_with_snapkv_is_pyramid() -> None:
    evidence = make_evidence()
    for one, other in [
        ("perhead@0.3(by=q2c, floor=0.1)", "adaptive@0.3(by=q2c, floor=0.1)"),
        ("perlayer@0.3(beta=5)", "pyramid@0.3(beta=5)"),
    ]:
        assert Codec(one).select(evidence).digest() == Codec(other).select(evidence).digest()


def test_layers_keep_falling_numbers_by_any_selectors_scores() -> None:
    evidence = make_evidence()
    for layer, budget in ((0, 54), (2, 6)):  # 30 on average, of which the last keeps a fifth
        expected = [sorted(best(row, budget)) for row in scored("keydiff@0.5", evidence, layer)]
        assert kept("perlayer@0.5(by=keydiff, beta=5)", evidence, layer) == expected


@pytest.mark.parametrize(
    "by, why", [("int8", "a selector: q2c"), ("pyramid", "no more than rank"), ("perhead", "no more than")]
)
def test_a_wrapper_takes_what_ranks_tokens_and_no_more(by: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        Codec(f"chunk@0.5(by={by})")


@pytest.mark.parametrize("by, layer", [("q2c", 0), ("finch", 2), ("h2o", 0)])
def test_critical_weighs_any_selectors_scores_by_the_values_projections(by: str, layer: int) -> None:
    evidence = make_evidence()
    weight = np.random.default_rng(3).normal(size=(20, HEADS * GROUP * DIM))
    evidence.projection = lambda layer: torch.from_numpy(weight).float()
    plain, values = scored(f"{by}@0.5", evidence, layer), keys_and_values(evidence, layer)[1]
    forced = set(selector(f"{by}@0.5").always(CONTEXT, 30))
    for head, found in enumerate(kept(f"critical@0.5(by={by}, first=0.4)", evidence, layer)):
        norms = np.zeros(CONTEXT)
        for query_head in range(head * GROUP, head * GROUP + GROUP):
            block = weight[:, query_head * DIM : (query_head + 1) * DIM]
            norms += np.abs(values[head] @ block.T).sum(1) / GROUP
        expected = forced | best(plain[head], 12)
        by_both = np.argsort(-(plain[head] + 1e-4) * norms, kind="stable").tolist()
        expected |= set([t for t in by_both if t not in expected][: 30 - len(expected)])
        assert set(found) == expected


def test_critical_refuses_scores_that_are_no_shares_of_attention() -> None:
    evidence = make_evidence()
    evidence.projection = lambda layer: torch.eye(HEADS * GROUP * DIM)
    with pytest.raises(CodecError, match="keynorm gives scores below 0"):
        Codec("critical@0.5(by=keynorm)").select(evidence)


def test_kvzip_keeps_the_most_that_any_token_of_the_repetition_pays() -> None:
    evidence = make_evidence()
    assert evidence.question_queries is not None and evidence.question_query_positions is not None
    weights = attention(
        evidence, 2, evidence.question_queries[2], evidence.question_query_positions
    ).numpy()  # that of whatever tokens come behind the context
    evidence.reread_queries = evidence.question_queries
    evidence.reread_query_positions = evidence.question_query_positions
    evidence.reread_cache, evidence.question_cache = evidence.question_cache, None
    most = weights.max(1).reshape(HEADS, GROUP, CONTEXT).max(1)
    np.testing.assert_allclose(scored("kvzip@0.5", evidence, 2), most, atol=1e-6)
    for row, scores in zip(kept("kvzip@0.25(sinks=0)", evidence, 2), most, strict=True):
        assert set(row) == best(scores, 15)
    evidence.reread_queries = None
    with pytest.raises(CodecError, match="read again, and it was not"):
        Codec("kvzip@0.5").select(evidence)
