"""Selection on every architecture: scores beside those of eager full attention, and answers from what was kept and sent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import REPEAT, Evidence, Needs, gather
from testbed.codecs.select import OnlineSelection
from testbed.codecs.select.q2c import Q2C
from testbed.errors import SpecError
from testbed.models.kvcache import KVCache, KVLayer, join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from tests.models import reference
from tests.tiny_models import FAMILIES, NEWEST, SHAPES

Tiny = Callable[[str], Path]

PREFIX = "Context: The number of the blue boat is 17.\nQuestion: What is the number?\nAnswer: 17\n\n"
CONTEXT = "Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821."
QUESTION = "\nQuestion: Who mended the clock?\nAnswer:"
ANSWER = " Anna Lind"

#: What a reference looks at: attention weights of all tokens to the context's, [kv_heads, group, queries, context], and of
#: how many tokens prefix, context, question and answer have.
Weighing = Callable[[Tensor, int, int, int, int], Tensor]


def of_question(w: Tensor, p: int, c: int, q: int, a: int) -> Tensor:
    """What the question's tokens pay on average: [kv_heads, context]."""
    return w[:, :, p + c : p + c + q].mean((1, 2))


def of_last(window: int) -> Weighing:
    """What the last context tokens pay on average."""
    return lambda w, p, c, q, a: w[:, :, p + c - window : p + c].mean((1, 2))


def of_context(w: Tensor, p: int, c: int, q: int, a: int) -> Tensor:
    """What all context tokens pay together."""
    return w[:, :, p : p + c].mean(1).sum(1)


def of_all(w: Tensor, p: int, c: int, q: int, a: int) -> Tensor:
    """What all context tokens and all question tokens pay together."""
    return w[:, :, p : p + c + q].mean(1).sum(1)


def of_answer(w: Tensor, p: int, c: int, q: int, a: int) -> Tensor:
    """What is paid together where the answer's tokens are predicted."""
    return w[:, :, p + c + q - 1 : p + c + q + a - 1].mean(1).sum(1)


def pooled(weighing: Weighing, kernel: int, how: str = "max", apart: int = 0) -> Weighing:
    """Each token's neighbourhood, but for the last `apart` tokens, which are left as they are."""

    def weigh(w: Tensor, p: int, c: int, q: int, a: int) -> Tensor:
        scores = weighing(w, p, c, q, a)
        result = scores.clone()
        for t in range(c - apart):
            around = scores[:, max(0, t - kernel // 2) : min(c - apart, t + kernel // 2 + 1)]
            result[:, t] = around.amax(1) if how == "max" else around.sum(1) / kernel
        return result

    return weigh


SCORES: dict[str, Weighing] = {
    "q2c@0.5(pool=1)": of_question,
    "q2c@0.5(pool=5)": pooled(of_question, 5),
    "q2c@0.5": pooled(of_question, 15),
    "snapkv@0.5(window=9, kernel=1)": of_last(9),
    "snapkv@0.5(window=9)": pooled(of_last(9), 7, apart=9),
    "snapkv@0.5(window=9, kernel=5, pool=mean)": pooled(of_last(9), 5, "mean", apart=9),
    "snapkv@0.5(question=true, kernel=1)": of_question,
    "snapkv@0.5(question=true)": pooled(of_question, 7),
    "snapkv@0.5(window=0, kernel=1)": lambda w, p, c, q, a: of_context(w, p, c, q, a) / c,
    "snapkv@0.5(window=0, kernel=1, question=true)": lambda w, p, c, q, a: of_all(w, p, c, q, a) / (c + q),
    "snapkv@0.5(window=0, question=true)": pooled(lambda w, p, c, q, a: of_all(w, p, c, q, a) / (c + q), 7),
    "pyramid@0.5(window=5, kernel=1)": of_last(5),
    "pyramid@0.5(window=5)": pooled(of_last(5), 7, apart=5),
    "h2o@0.5": of_context,
    "h2o@0.5(normalised=true)": lambda w, p, c, q, a: (
        of_context(w, p, c, q, a) / torch.tensor([float(c - t) for t in range(c)])
    ),
    "h2o@0.5(question=true)": of_all,
    "h2o@0.5(normalised=true, question=true)": lambda w, p, c, q, a: (
        of_all(w, p, c, q, a) / torch.tensor([float(c + q - t) for t in range(c)])
    ),
    "tova@0.5": lambda w, p, c, q, a: w[:, :, p + c - 1].mean((0, 1)).expand(len(w), -1),
    "adaptive@0.5(by=q2c)": pooled(of_question, 15),
    "adaptive@0.5(by=h2o)": of_context,
    "adaptive@0.5(by=oracle)": of_answer,
    "adaptive@0.5": pooled(of_last(32), 7, apart=32),
    "oracle@0.5": of_answer,
    "oracle@0.5(pool=3)": pooled(of_answer, 3),
}
#: Mistral's layers all slide, so that none is pruned.
PRUNED = [*(name for name in (*FAMILIES, *SHAPES) if name != "mistral"), "gpt_oss"]


@functools.cache
def prepared(path: Path) -> tuple[LanguageModel, list[list[int]], Evidence]:
    """A model that rounds nothing, the prompt's four stretches, and all evidence there can be."""
    model = load_model(str(path), threads=1, cache_dtype=torch.float32)
    stretches = [model.tokenize(PREFIX, start=True), *map(model.tokenize, (CONTEXT, QUESTION, ANSWER))]
    prefix = model.prefill(stretches[0], None).cache
    context = model.prefill(stretches[1], prefix, queries=None, attention=True)
    return (
        model,
        stretches,
        gather(model, Needs(None, True, True), prefix, context, *stretches[2:], seed="one"),
    )


@functools.cache
def eager_attentions(path: Path) -> Any:
    """transformers' own attention weights of the whole prompt, by layer [1, q_heads, tokens, tokens]."""
    _, stretches, _ = prepared(path)
    network = reference.reference_network(path, "eager")
    with torch.no_grad():
        return network(
            torch.tensor([[token for ids in stretches for token in ids]]), output_attentions=True
        ).attentions


def expected_scores(path: Path, text: str, layer: int) -> Tensor:
    """What a selector's scores of a layer must be by transformers' own attention weights: [kv_heads, context]."""
    _, stretches, evidence = prepared(path)
    prefix, context, question, answer = map(len, stretches)
    weights = eager_attentions(path)[layer][0, ..., prefix : prefix + context]
    grouped = weights.unflatten(0, (evidence.cache.layers[layer].kv_heads, -1))
    return SCORES[text](grouped, prefix, context, question, answer)


@pytest.mark.parametrize("text", SCORES)
@pytest.mark.parametrize("family", PRUNED)
def test_scores_equal_those_of_eager_full_attention(tiny_model: Tiny, family: str, text: str) -> None:
    path = tiny_model(family)
    _, _, evidence = prepared(path)
    selector: Any = Codec(text).selector
    assert evidence.prunable
    for layer in evidence.prunable:
        expected = expected_scores(path, text, layer)
        torch.testing.assert_close(selector.scores(evidence, layer), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PRUNED)
def test_what_the_prefill_summed_up_is_what_all_queries_give(tiny_model: Tiny, family: str) -> None:
    path = tiny_model(family)
    _, _, evidence = prepared(path)
    assert evidence.context_attention is not None
    queries_alone = replace(evidence, context_attention=None)
    for layer in evidence.prunable:
        for text in ("h2o@0.5", "h2o@0.5(normalised=true)"):
            found = Codec(text).selector.scores(queries_alone, layer)  # type: ignore[union-attr]
            torch.testing.assert_close(found, expected_scores(path, text, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize("pool", [1, 5])
@pytest.mark.parametrize("family", PRUNED)
def test_no_token_is_dropped_that_eager_attention_ranks_above_one_kept(
    tiny_model: Tiny, family: str, pool: int, scope: str
) -> None:
    path = tiny_model(family)
    _, stretches, evidence = prepared(path)
    kept = Codec(f"q2c@0.4(pool={pool}, scope={scope}, sinks=2)").select(evidence)
    scores = {layer: expected_scores(path, f"q2c@0.5(pool={pool})", layer) for layer in evidence.prunable}
    everywhere = torch.stack([each.mean(0) for each in scores.values()]).mean(0)
    for layer, each in scores.items():
        index = kept.layers[layer]
        assert index is not None and index.shape[-1] == round(0.4 * len(stretches[1]))
        ranking = {"global": everywhere[None], "layer": each.mean(0, keepdim=True), "head": each}[scope]
        for row, chosen in zip(ranking, index if index.dim() == 2 else index[None], strict=True):
            held = torch.zeros(len(row), dtype=torch.bool)
            held[chosen] = True
            assert bool(held[:2].all())
            held_by_score = held.clone()
            held_by_score[:2] = False
            assert float(row[held_by_score].min()) > float(row[~held].max()) - 2e-5


@pytest.mark.parametrize("family", PRUNED)
def test_kvzip_is_the_most_that_eager_attention_pays_while_the_context_is_read_again(
    tiny_model: Tiny, family: str
) -> None:
    path = tiny_model(family)
    model, stretches, evidence = prepared(path)
    assert evidence.prefix is not None
    ids = [*stretches[0], *stretches[1], *model.tokenize(REPEAT), *stretches[1]]
    context = model.prefill(stretches[1], evidence.prefix)
    again = gather(model, Codec("kvzip@0.5").needs, evidence.prefix, context, ())
    with torch.no_grad():
        network = reference.reference_network(path, "eager")
        weights = network(torch.tensor([ids]), output_attentions=True).attentions
    first, end = len(stretches[0]), len(stretches[0]) + len(stretches[1])
    for layer in evidence.prunable:
        paid = weights[layer][0, :, end:, first:end].amax(1)  # [q_heads, context]
        expected = paid.unflatten(0, (evidence.cache.layers[layer].kv_heads, -1)).amax(1)
        selector: Any = Codec("kvzip@0.5").selector
        torch.testing.assert_close(selector.scores(again, layer), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in PRUNED if name != "gpt_oss"])  # a sink takes its share
def test_the_output_projection_is_what_attention_makes_of_a_lone_tokens_value(
    tiny_model: Tiny, family: str
) -> None:
    model, *_ = prepared(tiny_model(family))
    network, outputs = reference.reference_network(tiny_model(family), "eager"), []
    values = []
    for token in (7, 11):
        given: dict[int, Tensor] = {}

        def note(module: Any, _: Any, output: Any, given: dict[int, Tensor] = given) -> None:
            given.setdefault(module.layer_idx, output[0][0, 0])

        attending = [
            module
            for module in network.modules()
            if hasattr(module, "layer_idx") and hasattr(module, "scaling")
        ]
        hooks = [module.register_forward_hook(note) for module in attending]
        with torch.no_grad():
            network(torch.tensor([[token]]))
        for hook in hooks:
            hook.remove()
        outputs.append(given)
        cache = model.prefill([token], None).cache
        values.append([model.attended(i, layer)[1][:, 0] for i, layer in enumerate(cache.layers)])
    for layer in range(model.num_layers):
        weight = model.projection(layer)
        change = values[1][layer] - values[0][layer]  # a bias is in both
        group = weight.shape[1] // change.numel()
        expected = outputs[1][layer] - outputs[0][layer]
        torch.testing.assert_close(
            weight @ change.repeat_interleave(group, 0).flatten(), expected, atol=1e-4, rtol=1e-3
        )


#: The selectors as the study defines them, and what they sum over all heads of the last layer alone.
PUBLISHED: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "q2c@0.4(sinks=0, pool=1, scope=global, layers=last)": lambda w, p, c, q: w[:, p + c : p + c + q],
    "snapkv@0.4(window=0, kernel=1, question=true, scope=global, layers=last)": lambda w, p, c, q: w[
        :, p : p + c + q
    ],
    "h2o@0.4(recent=0, question=true, scope=global, layers=last)": lambda w, p, c, q: w[:, p : p + c + q],
}


@pytest.mark.parametrize("text", PUBLISHED)
@pytest.mark.parametrize("family", PRUNED)
def test_the_published_forms_rank_once_by_what_all_heads_of_the_last_layer_pay(
    tiny_model: Tiny, family: str, text: str
) -> None:
    path = tiny_model(family)
    _, stretches, evidence = prepared(path)
    prefix, context, question, _ = map(len, stretches)
    last = evidence.prunable[-1]
    weights = PUBLISHED[text](eager_attentions(path)[last][0], prefix, context, question)
    scores = weights.sum((0, 1))[prefix : prefix + context]
    budget = round(0.4 * context)
    lists = [index for index in Codec(text).select(evidence).layers if index is not None]
    assert len(lists) == len(evidence.prunable)
    for index in lists:
        assert index.shape == (budget,)
        assert torch.equal(index, lists[0])
        dropped = torch.ones(context, dtype=torch.bool).index_fill_(0, index, False)
        assert float(scores[index].min()) > float(scores[dropped].max()) - 2e-5


def test_the_last_layer_alone_makes_one_list_for_all_or_is_refused() -> None:
    with pytest.raises(SpecError, match="q2c: layers is last, but must be all unless scope=global"):
        Codec("q2c@0.25(layers=last)")


def test_where_all_layers_slide_everything_travels(tiny_model: Tiny) -> None:
    *_, evidence = prepared(tiny_model("mistral"))
    assert evidence.prunable == []
    for text in SCORES:
        kept = Codec(text).select(evidence)
        assert all(index is None for index in kept.layers)


@pytest.mark.parametrize("family", PRUNED)
def test_expected_attention_is_the_exponential_of_a_gaussian_query_at_each_position_ahead(
    tiny_model: Tiny, family: str
) -> None:
    """Straight loops: heads, tokens; the rotation position by position."""
    model, stretches, evidence = prepared(tiny_model(family))
    layer = evidence.prunable[-1]
    held = evidence.cache.layers[layer]
    keys, values = model.attended(layer, held)
    queries = evidence.context_queries[layer]  # type: ignore[index]
    positions = evidence.context_query_positions
    assert positions is not None
    rotation = model.rotation(layer)
    ahead = torch.arange(40) + evidence.cache.length
    scores = torch.zeros(len(keys), len(stretches[1]), dtype=torch.float64)
    group = len(queries) // len(keys)
    for head, asked in enumerate(queries):
        plain = rotation.undo(asked[None], positions)[0, 4:].double()
        basis = torch.eye(plain.shape[1])[None]
        turn = (
            torch.stack([rotation.apply(basis, at.expand(plain.shape[1]))[0] for at in ahead])
            .mean(0)
            .double()
        )
        mean = plain.mean(0) @ turn
        covariance = turn.T @ torch.cov(plain.T, correction=0) @ turn
        logits = []
        for key in keys[head // group, 4:].double():
            scaled = key * model.scaling(layer)
            logits.append(scaled @ mean + scaled @ covariance @ scaled / 2)
        scores[head // group, 4:] += torch.stack(logits).softmax(0) / group
    scores[:, 4:] *= values[:, 4:].double().norm(dim=-1)
    found = Codec("expected@0.5(future=40)").selector.scores(evidence, layer)  # type: ignore[union-attr]
    expected = scores.unflatten(0, (held.kv_heads, -1)).mean(1).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["q2c@0.5", "random@0.4(scope=layer)", "random@0.4(scope=head)", "adaptive@0.4(by=keynorm, floor=0)"],
)
@pytest.mark.parametrize("family", [*FAMILIES, *NEWEST])
def test_what_was_pruned_quantized_and_sent_answers_as_full_attention_under_a_mask(
    tiny_model: Tiny, family: str, text: str
) -> None:
    model, stretches, evidence = prepared(tiny_model(family))
    prefix, context, question, _ = stretches
    cache = evidence.cache.to(dtype=torch.float16)
    codec = Codec(f"{text}+int8")
    sent = decode(codec.encode(cache, codec.select(evidence))).to(dtype=torch.float32)
    assert evidence.prefix is not None
    past = join(evidence.prefix, sent)
    result = model.prefill(question, past)
    answer = model.generate(question, past, 6, None)

    total = len(prefix) + len(context) + len(question) + 6
    hidden = reference.nothing_hidden(model.num_layers, model.kv_heads, total)
    replaced = []
    for layer, held in enumerate(past.layers):
        for head, positions in enumerate(held.positions.expand(held.kv_heads, -1)):
            dropped = torch.ones(past.length, dtype=torch.bool)
            dropped[positions[positions >= 0]] = False
            hidden[layer][head, past.length :, : past.length] = dropped
        own: KVLayer = sent.layers[layer]
        replaced.append((own.positions, *model.attended(layer, own)))
    network = reference.reference_network(tiny_model(family))
    ids = prefix + context + question
    for step in range(len(answer) + 1):
        expected = reference.logits(network, ids + answer[:step], hidden, replaced)[-1]
        if step == 0:
            assert result.logits is not None
            torch.testing.assert_close(result.logits, expected, atol=2e-4, rtol=2e-4)
        if step < len(answer):
            assert int(expected.argmax()) == answer[step]


@pytest.mark.parametrize(
    "family, size",
    [
        *((family, 7) for family in PRUNED),
        *((family, size) for family in ("llama", "gemma3") for size in (1, 1000)),
    ],
)
def test_a_context_that_arrives_in_chunks_is_scored_as_a_whole_one(
    tiny_model: Tiny, family: str, size: int
) -> None:
    model, stretches, evidence = prepared(tiny_model(family))
    _, context, question, _ = stretches
    assert evidence.prefix is not None
    online = OnlineSelection(model, Q2C(0.3), evidence.prefix, question)
    chunks = [context[at : at + size] for at in range(0, len(context), size)]
    if size == 1:
        chunks = [context[:20], *([token] for token in context[20:24]), context[24:]]
    past: KVCache = evidence.prefix
    arrived = 0
    for chunk in chunks:
        prefilled = model.prefill(chunk, past)
        past = join(past, prefilled.cache)
        kept = online.arrive(prefilled.cache)
        arrived += len(chunk)
        assert kept.context_tokens == arrived and kept.tokens == max(1, round(0.3 * arrived))
    whole = Q2C(0.3).select(evidence)
    for layer in evidence.prunable:
        torch.testing.assert_close(
            online.scores(layer), Q2C(0.3).scores(evidence, layer), atol=1e-5, rtol=1e-4
        )
        assert torch.equal(kept.layers[layer], whole.layers[layer])  # type: ignore[arg-type]
