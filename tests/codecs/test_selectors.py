"""Kept tokens beside those of straight references: one query, one head, one key at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.codecs import CodecError, registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Kept, Needs
from testbed.codecs.select.pyramid import Pyramid
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.rope import Rope
from testbed.models.rotary import unrotated
from tests.codecs.caches import random_layer, same_cache

HEADS, GROUP, DIM, LAYERS = 2, 3, 16, 3
PREFIX, CONTEXT, QUESTION = 5, 60, 7


def make_evidence(
    seed: int = 0, prefix: int = PREFIX, context: int = CONTEXT, question: int = QUESTION
) -> Evidence:
    """Random caches and queries of a model with grouped heads whose second layer has a sliding window."""
    generator = torch.Generator().manual_seed(seed)
    ends = list(itertools.accumulate([prefix, context, question]))

    def stretch(first: int, end: int) -> KVCache:
        layers = []
        for layer in range(LAYERS):
            where = torch.arange(first, end)
            made = random_layer(HEADS, DIM, DIM, where, torch.float32, generator, 16 if layer == 1 else None)
            layers.append(KVLayer(made.keys / 2, made.values, where, made.window))
        return KVCache(layers, end)

    def queries(count: int) -> list[Tensor]:
        return [torch.randn(HEADS * GROUP, count, DIM, generator=generator) for _ in range(LAYERS)]

    return Evidence(
        cache=stretch(ends[0], ends[1]),
        prefix=stretch(0, ends[0]) if prefix else None,
        question_cache=stretch(ends[1], ends[2]),
        context_queries=queries(context),
        context_query_positions=torch.arange(ends[0], ends[1]),
        question_queries=queries(question),
        question_query_positions=torch.arange(ends[1], ends[2]),
        scaling=lambda layer: 0.3 + 0.1 * layer,
        softcap=lambda layer: 20.0 if layer == 2 else None,
        seed="example-1",
    )


def attention(evidence: Evidence, layer: int, queries: Tensor, positions: Tensor) -> Tensor:
    """Causal softmax attention of each query to each context token: float64 [q_heads, n, context tokens]."""
    caches = [c for c in (evidence.prefix, evidence.cache, evidence.question_cache) if c is not None]
    keys = torch.cat([cache.layers[layer].keys for cache in caches], 1).double()
    where = torch.cat([cache.layers[layer].positions for cache in caches]).tolist()
    first = evidence.prefix.length if evidence.prefix else 0
    context = evidence.cache.layers[layer].tokens
    result = torch.zeros(queries.shape[0], queries.shape[1], context, dtype=torch.float64)
    for head in range(queries.shape[0]):
        for i, position in enumerate(positions.tolist()):
            scores = []
            for key, key_position in zip(keys[head // GROUP], where, strict=True):
                score = float(queries[head, i].double() @ key) * evidence.scaling(layer)
                cap = evidence.softcap(layer)
                score = cap * math.tanh(score / cap) if cap else score
                scores.append(math.exp(score) if key_position <= position else 0.0)
            weights = torch.tensor(scores, dtype=torch.float64) / sum(scores)
            result[head, i] = weights[first : first + context]
    return result


def by_kv_head(weights: Tensor) -> Tensor:
    """[q_heads, n, tokens] -> the mean over each group's heads."""
    return weights.unflatten(0, (HEADS, GROUP)).mean(1)


def question_weights(evidence: Evidence, layer: int) -> Tensor:
    assert evidence.question_queries is not None and evidence.question_query_positions is not None
    return by_kv_head(
        attention(evidence, layer, evidence.question_queries[layer], evidence.question_query_positions)
    )


def scores_of(text: str, evidence: Evidence, layer: int) -> Tensor:
    return Codec(text).spec.selector.scores(evidence, layer)  # type: ignore[union-attr]


def neighbours(scores: Tensor, kernel: int, how: str) -> Tensor:
    """Max or mean over each token's neighbourhood, token by token."""
    result = scores.clone()
    for head, t in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
        around = scores[head, max(0, t - kernel // 2) : t + kernel // 2 + 1]
        result[head, t] = around.max() if how == "max" else around.sum() / kernel
    return result


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def test_keydiff_keeps_the_keys_that_are_least_like_the_others() -> None:
    evidence = make_evidence()
    scores = scores_of("keydiff@0.25", evidence, 2)
    kept = Codec("keydiff@0.25").select(evidence).layers[2]
    assert kept is not None and scores.shape == (HEADS, CONTEXT)
    for head in range(HEADS):
        keys = evidence.cache.layers[2].keys[head].tolist()
        units = [[x / math.sqrt(dot(key, key)) for x in key] for key in keys]
        anchor = [sum(unit[i] for unit in units) / CONTEXT for i in range(DIM)]
        assert scores[head].tolist() == pytest.approx([-cosine(key, anchor) for key in keys], abs=1e-6)
        likeness = [
            sum(cosine(key, other) for other in keys) for key in keys
        ]  # the same ranking, pair by pair
        assert kept[head].tolist() == sorted(sorted(range(CONTEXT), key=likeness.__getitem__)[:15])


def test_keydiff_takes_keys_of_zeros_and_of_one_direction() -> None:
    evidence = make_evidence()
    evidence.cache.layers[0].keys.zero_()
    assert scores_of("keydiff@0.25", evidence, 0).tolist() == [[0.0] * CONTEXT] * HEADS
    evidence.cache.layers[0].keys.fill_(3)
    evidence.cache.layers[0].keys[:, 7] *= -1
    kept = Codec("keydiff@0.1").select(evidence).layers[0]
    assert kept is not None and kept.tolist() == [[0, 1, 2, 3, 4, 7]] * HEADS


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("layer", [0, 2])
def test_q2c_is_the_mean_attention_of_the_question(prefix: int, layer: int) -> None:
    evidence = make_evidence(prefix=prefix)
    expected = question_weights(evidence, layer).mean(1)
    torch.testing.assert_close(
        scores_of("q2c@0.5(pool=1)", evidence, layer).double(), expected, atol=1e-6, rtol=1e-5
    )
    pooled = scores_of("q2c@0.5(pool=5)", evidence, layer).double()
    torch.testing.assert_close(pooled, neighbours(expected, 5, "max"), atol=1e-6, rtol=1e-5)


def highest(scores: Tensor, budget: int, always: set[int]) -> list[int]:
    """The budget's tokens of one list of scores, `always` among them."""
    rest = sorted((t for t in range(len(scores)) if t not in always), key=lambda t: (-float(scores[t]), t))
    return sorted([*always, *rest[: budget - len(always)]])


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize(
    "text, always",
    [
        ("q2c@0.25(sinks=4, pool=1, scope={})", {0, 1, 2, 3}),
        ("q2c@0.25(sinks=0, pool=3, scope={})", set()),
        ("snapkv@0.25(window=8, scope={})", set(range(52, 60))),
        ("h2o@0.25(recent=0.5, scope={})", set(range(52, 60))),
        ("random@0.25(scope={})", set()),
    ],
)
def test_the_scope_decides_who_shares_a_list(text: str, always: set[int], scope: str) -> None:
    evidence, codec = make_evidence(), Codec(text.format(scope))
    kept = codec.select(evidence)
    scores = {layer: codec.selector.scores(evidence, layer) for layer in (0, 2)}  # type: ignore[union-attr]
    assert kept.layers[1] is None  # the sliding-window layer
    for layer in (0, 2):
        found = kept.layers[layer]
        assert found is not None
        if scope == "global":
            assert found.tolist() == highest((scores[0].mean(0) + scores[2].mean(0)) / 2, 15, always)
        elif scope == "layer":
            assert found.tolist() == highest(scores[layer].mean(0), 15, always)
        else:
            assert found.tolist() == [highest(row, 15, always) for row in scores[layer]]
    assert kept.tokens == 15


def test_window_keeps_sinks_and_the_last_tokens() -> None:
    kept = Codec("window@0.25").select(make_evidence())
    assert kept.layers[0] is not None
    assert kept.layers[0].tolist() == [0, 1, 2, 3, *range(49, 60)]


def test_a_small_budget_keeps_the_most_important_of_what_is_always_kept() -> None:
    evidence = make_evidence()
    expected = {
        "q2c@0.05": [0, 1, 2],
        "snapkv@0.05": [57, 58, 59],
        "window@0.05": [0, 1, 2],
        "window@0.1": [0, 1, 2, 3, 58, 59],
    }
    for text, tokens in expected.items():
        kept = Codec(text).select(evidence).layers[0]
        assert kept is not None
        assert kept.tolist() == tokens


def test_equal_scores_keep_the_earlier_token() -> None:
    evidence = make_evidence()
    for layer in (0, 2):
        evidence.cache.layers[layer].keys.zero_()
    kept = Codec("q2c@0.25(sinks=0, scope=layer)").select(evidence).layers[0]
    assert kept is not None
    assert kept.tolist() == list(range(15))


def test_random_depends_on_the_seed_alone() -> None:
    evidence, again, other = make_evidence(), make_evidence(seed=1), make_evidence()
    other.seed = "example-2"
    digests = [Codec("random@0.5").select(e).digest() for e in (evidence, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_digests_tell_choices_apart() -> None:
    evidence = make_evidence()
    texts = [
        "fp16",
        "q2c@0.5",
        "q2c@0.25",
        "q2c@0.5(scope=layer)",
        "q2c@0.5(scope=global)",
        "h2o@0.5",
        "window@0.5",
    ]
    digests = [Codec(text).select(evidence).digest() for text in texts]
    assert len(set(digests)) == len(texts)
    assert digests == [Codec(text).select(make_evidence()).digest() for text in texts]
    assert Kept.everything(evidence.cache).tokens == CONTEXT


@pytest.mark.parametrize(
    "text, needs",
    [
        ("int8", Needs(0, False)),
        ("q2c@0.5", Needs(0, True)),
        ("snapkv@0.5(window=16)", Needs(16, False)),
        ("snapkv@0.5(question=true)", Needs(0, True)),
        ("h2o@0.5", Needs(context_attention=True)),
        ("window@0.5+int8", Needs(0, False)),
        ("random@0.5", Needs(0, False)),
    ],
)
def test_a_codec_says_what_the_edge_must_keep(text: str, needs: Needs) -> None:
    assert Codec(text).needs == needs


def test_queries_that_were_not_kept_are_named() -> None:
    evidence = make_evidence()
    evidence.question_queries = None
    evidence.context_queries = [queries[:, -8:] for queries in evidence.context_queries or ()]
    with pytest.raises(CodecError, match="the question's queries, and there are none"):
        Codec("q2c@0.5").select(evidence)
    with pytest.raises(CodecError, match="queries of 60 context tokens; 8 were kept"):
        Codec("h2o@0.5").select(evidence)
    Codec("snapkv@0.5(window=8)").select(evidence)


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
def test_what_was_kept_crosses_with_its_positions(scope: str) -> None:
    evidence = make_evidence()
    cache = evidence.cache.to(dtype=torch.float16)
    codec = Codec(f"q2c@0.25(scope={scope})")
    kept = codec.select(evidence)
    decoded = decode(codec.encode(cache, kept))
    assert same_cache(decoded, kept.apply(cache))
    assert decoded.length == PREFIX + CONTEXT
    index = kept.layers[0]
    assert index is not None
    assert torch.equal(decoded.layers[0].positions, index + PREFIX)


#: KV heads, query heads of each, elements of a key and of a value
SHAPES = {
    "grouped": (2, 3, 16, 16),
    "multi-head": (4, 1, 8, 8),
    "multi-query": (1, 4, 16, 16),
    "latent": (1, 4, 20, 8),
}


def shaped_evidence(shape: str, context: int) -> Evidence:
    """Evidence of any shape with everything in it, two layers with full attention and one with a sliding window."""
    heads, group, key_dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(context)

    def stretch(first: int, end: int) -> KVCache:
        where = torch.arange(first, end)
        made = [
            random_layer(heads, key_dim, value_dim, where, torch.float16, generator, window)
            for window in (None, 16, None)
        ]
        return KVCache(made, end)

    def queries(count: int) -> list[Tensor]:
        return [torch.randn(heads * group, count, key_dim, generator=generator) for _ in range(3)]

    return Evidence(
        cache=stretch(5, 5 + context),
        prefix=stretch(0, 5),
        question_cache=stretch(5 + context, 15 + context),
        context_queries=queries(context),
        context_query_positions=torch.arange(5, 5 + context),
        question_queries=queries(7),
        question_query_positions=torch.arange(5 + context, 12 + context),
        answer_queries=queries(3),
        answer_query_positions=torch.arange(12 + context, 15 + context),
        reread_queries=queries(context + 2),
        reread_query_positions=torch.arange(5 + context, 7 + 2 * context),
        reread_cache=stretch(5 + context, 7 + 2 * context),
        scaling=lambda layer: 0.2,
        rotation=lambda layer: unrotated(key_dim, torch.device("cpu")),
        projection=lambda layer: torch.eye(24, heads * group * value_dim),
        seed="one",
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", registry.SELECTORS)
@given(ratio=st.floats(0.001, 1), context=st.integers(1, 70))
@settings(max_examples=12)
def test_every_selector_on_every_shape_keeps_its_budget_in_order_and_its_sinks_alike_each_time(
    name: str, shape: str, ratio: float, context: int
) -> None:
    evidence, codec = shaped_evidence(shape, context), Codec(f"{name}@{ratio:.4f}")
    kept = codec.select(evidence)
    assert kept.digest() == codec.select(shaped_evidence(shape, context)).digest()
    budget = max(1, round(codec.selector.ratio * context))  # type: ignore[union-attr]
    assert kept.layers[1] is None  # the sliding-window layer
    total = 0
    for index in (kept.layers[0], kept.layers[2]):
        rows = [torch.arange(context)] if index is None else list(index.reshape(-1, index.shape[-1]))
        held = [row[row >= 0] for row in rows]
        total += sum(map(len, held)) * (SHAPES[shape][0] // len(rows))
        for row in held:
            assert bool((row.diff() > 0).all()) and (not len(row) or int(row[-1]) < context)
            sinks = min(getattr(codec.selector, "sinks", 0), context, budget)
            assert row[:sinks].tolist() == list(range(sinks))
    assert abs(total - 2 * SHAPES[shape][0] * budget) <= (
        SHAPES[shape][0] if name in ("pyramid", "perlayer") else 0
    )
    layers = [replace(layer, rope=Rope((0.5,), (0,), 1)) for layer in evidence.cache.layers]
    cache = KVCache(layers, evidence.cache.length)  # for keys that are to be turned
    assert same_cache(decode(codec.encode(cache, kept)), kept.apply(cache))


def test_pyramid_budgets_fall_from_layer_to_layer_and_sum_to_equal_ones() -> None:
    selector = Pyramid(0.25)
    for tokens, layers in ((1024, 30), (100, 4), (512, 2)):
        budget = round(0.25 * tokens)
        budgets = selector.budgets(tokens, budget, layers)
        assert sum(budgets) == budget * layers
        assert budgets == sorted(budgets, reverse=True) and budgets[0] > budgets[-1]
        assert budgets[-1] == pytest.approx(budget / 20, abs=1)
    assert selector.budgets(100, 80, 3)[0] == 100  # no layer keeps more than there is


def test_adaptive_heads_share_the_budget_of_their_layer_by_their_scores() -> None:
    evidence = shaped_evidence("multi-head", 60)
    evidence.cache.layers[0].keys[1] /= 8  # by the norms of keys, all of this head's tokens are worth more
    index = Codec("adaptive@0.5(by=keynorm, floor=0.2)").select(evidence).layers[0]
    assert index is not None
    counts = (index >= 0).sum(1).tolist()
    assert counts[1] == 60 and sum(counts) == 4 * 30 and min(counts) >= 6
    scores = -evidence.cache.layers[0].keys.float().norm(dim=-1)
    dropped = torch.ones_like(scores, dtype=torch.bool)
    for head, row in enumerate(index):
        dropped[head, row[row >= 0]] = False
    safe = scores.argsort(1, descending=True)[:, :6]
    assert not bool(dropped.gather(1, safe).any())
    free = ~dropped
    free.scatter_(1, safe, False)
    assert float(scores[free].min()) >= float(scores[dropped].max())
