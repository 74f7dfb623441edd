"""Merging: runs of like tokens and spread values, beside references that go token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Kept
from testbed.endpoints.choice import chosen
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache
from tests.codecs.test_selectors import CONTEXT, HEADS, cosine, make_evidence, scores_of


def in_float16(evidence: Evidence) -> KVCache:
    layers = [layer.to(dtype=torch.float16) for layer in evidence.cache.layers]
    return KVCache(layers, evidence.cache.length)


def sent(evidence: Evidence, text: str) -> tuple[Kept, KVCache]:
    kept = Codec(text).select(evidence)
    return kept, decode(Codec(f"{text}+fp16").encode(in_float16(evidence), kept))


def runs_of(keys: list[list[float]], budget: int, alone: list[int]) -> list[list[int]]:
    """Cut where neighbours are least alike, around those that stay alone first."""
    links = sorted(
        (-2.0 if {t, t + 1} & set(alone) else cosine(keys[t], keys[t + 1]), t) for t in range(len(keys) - 1)
    )
    ends = [*sorted(t for _, t in links[: budget - 1]), len(keys) - 1]
    starts = [0, *(t + 1 for t in ends[:-1])]
    return [list(range(a, b + 1)) for a, b in zip(starts, ends, strict=True)]


def merged(states: list[list[float]], run: list[int], weights: list[float]) -> list[float]:
    return [
        sum(w * states[t][i] for t, w in zip(run, weights, strict=True)) / sum(weights)
        for i in range(len(states[0]))
    ]


@pytest.mark.parametrize(("by", "always"), [("keydiff", 0), ("q2c", 4), ("snapkv", 32), ("window", 60)])
def test_a_run_of_like_keys_becomes_its_highest_scored_token(by: str, always: int) -> None:
    evidence, text = make_evidence(), f"merge@0.6(by={by})"
    kept, cache = sent(evidence, text)
    budget = 36
    for layer in (0, 2):
        index = kept.layers[layer]
        assert index is not None and index.shape == (HEADS, budget)
        own = evidence.cache.layers[layer]
        alone = list(Codec(f"{by}@0.6").spec.selector.always(CONTEXT, budget))[:budget]  # type: ignore[union-attr]
        assert len(alone) == min(always, budget)
        worth = scores_of(f"{by}@0.6", evidence, layer) if by != "window" else torch.zeros(HEADS, CONTEXT)
        worth[:, alone] = math.inf
        for head in range(HEADS):
            keys, values = own.keys[head].tolist(), own.values[head].tolist()
            runs = runs_of(keys, budget, alone)
            pivots = [max(run, key=lambda t, h=head: (worth[h, t].item(), -t)) for run in runs]  # type: ignore[misc]
            assert index[head].tolist() == pivots
            for place, (run, pivot) in enumerate(zip(runs, pivots, strict=True)):
                far = [math.dist(keys[pivot], keys[t]) for t in run]
                deviation = sum(far) / (math.sqrt(2) * len(run)) or 1.0
                weights = [math.exp(-(d**2) / (2 * deviation**2)) for d in far]
                found = cache.layers[layer]
                assert found.keys[head, place].tolist() == pytest.approx(merged(keys, run, weights), abs=4e-3)
                assert found.values[head, place].tolist() == pytest.approx(
                    merged(values, run, weights), abs=8e-3
                )
    assert kept.layers[1] is None and torch.equal(cache.layers[1].keys, in_float16(evidence).layers[1].keys)


@pytest.mark.parametrize("scope", ["head", "layer", "global"])
@pytest.mark.parametrize("reach", [1, 4, 64])
def test_dropped_values_are_spread_over_the_kept_tokens_behind_them(scope: str, reach: int) -> None:
    evidence = make_evidence()
    kept, cache = sent(evidence, f"merge@0.25(by=q2c, form=cam, reach={reach}, scope={scope})")
    plain = Codec(f"q2c@0.25(scope={scope})").select(evidence)
    taken = 0
    for layer in (0, 2):
        index, own = kept.layers[layer], evidence.cache.layers[layer]
        assert index is not None and torch.equal(index, plain.layers[layer])  # type: ignore[arg-type]
        scores = scores_of("q2c@0.25", evidence, layer)
        for head, row in enumerate(index.expand(HEADS, -1).tolist()):
            assert torch.equal(cache.layers[layer].keys[head], own.keys[head, row].half())
            values = {t: own.values[head, t].double() for t in row}
            extra = cache.layers[layer].values[head].double() - torch.stack([values[t] for t in row])
            merging = kept.merged[layer]
            assert merging is not None
            weights = dict(zip(merging.of[head].tolist(), merging.values[head].tolist(), strict=True))
            assert sorted([*weights, *row]) == list(range(CONTEXT))
            expected = torch.zeros_like(extra)
            for t, weight in weights.items():
                behind = [place for place, u in enumerate(row) if u > t][:reach]
                mean = sum(scores[head, row[place]].item() for place in behind) / (len(behind) or 1)
                sure = not behind or scores[head, t] >= mean * 1.0001
                assert weight == pytest.approx(0 if not behind or weight == 0 else 1 / len(behind))
                assert not sure or (weight > 0) == bool(behind)
                taken += weight > 0
                for place in behind:
                    expected[place] += weight * own.values[head, t].double()
            torch.testing.assert_close(extra, expected, atol=2e-2, rtol=2e-3)
    assert taken


def test_chance_is_the_examples_own() -> None:
    def payload(evidence: Evidence) -> bytes:
        codec = Codec("merge@0.25(by=q2c, form=cam)+fp16")
        return bytes(codec.encode(in_float16(evidence), codec.select(evidence)))

    evidence = make_evidence()
    assert payload(evidence) == payload(make_evidence()) != payload(replace(evidence, seed="example-2"))


@pytest.mark.parametrize("form", ["kvmerger", "cam"])
def test_a_budget_of_one_and_of_all(form: str) -> None:
    evidence = make_evidence()
    kept, cache = sent(evidence, f"merge@0.01(by=q2c, form={form})")
    assert kept.tokens == 1 and bool(cache.layers[0].values.isfinite().all())
    kept = Codec(f"merge@1(form={form})").select(evidence)
    assert kept.merged == () and kept.digest() == Kept.everything(evidence.cache).digest()


def test_equal_keys_are_one_run_and_their_mean() -> None:
    evidence = make_evidence()
    for layer in evidence.cache.layers:
        layer.keys[:, 10:20] = layer.keys[:, 10:11]
    kept, cache = sent(evidence, "merge@0.85(by=keydiff)")  # 50 of 59 links are cut, and 9 are between equals
    index = kept.layers[0]
    assert index is not None
    inside = [[t for t in row if 10 <= t < 20] for row in index.tolist()]
    assert [len(row) for row in inside] == [1, 1]
    place = index[0].tolist().index(inside[0][0])
    mean: Tensor = evidence.cache.layers[0].values[0, 10:20].mean(0)
    torch.testing.assert_close(cache.layers[0].values[0, place].float(), mean, atol=4e-3, rtol=4e-3)


def test_what_cannot_be_merged_is_said() -> None:
    with pytest.raises(SpecError, match="head where form=kvmerger"):
        Codec("merge@0.5(scope=layer)")
    with pytest.raises(SpecError, match="a selector that has scores where form=cam"):
        Codec("merge@0.5(by=window, form=cam)")
    with pytest.raises(CodecError, match="gives scores below 0"):
        Codec("merge@0.5(by=keydiff, form=cam)").select(make_evidence())
    with pytest.raises(CodecError, match="its selector merges caches"):
        chosen(Codec("merge@0.5(by=q2c, form=cam, scope=global)").select(make_evidence()), CONTEXT)
    text = "merge@0.5(by=q2c, form=cam)"
    assert Codec(text).select(make_evidence()).digest() != Codec("q2c@0.5").select(make_evidence()).digest()
