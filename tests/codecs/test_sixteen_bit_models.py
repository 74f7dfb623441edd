"""Selectors and codecs on models that compute in 16 bits, as on every GPU: nothing is known only in float32."""

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
from testbed.codecs.evidence import Evidence, Needs, gather
from testbed.errors import UsageError
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.rotary import Rotation
from tests.codecs.test_families import ANSWER, CONTEXT, PREFIX, PRUNED, QUESTION, SCORES
from tests.tiny_models import FAMILIES

ON_GPUS = True  #: where there is one, these models compute on it
Tiny = Callable[[str], Path]
FORMATS = ["bfloat16", "float16"]
#: Whose keys leave a projection, or a norm behind it, just before they are turned.
LLAMA_SHAPED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]


@functools.cache
def prepared(path: Path, dtype: str) -> tuple[LanguageModel, list[int], Evidence]:
    """A model of that format, the tokens of each stretch of its prompt, and all evidence there can be."""
    model = load_model(str(path), dtype=dtype, threads=1)
    stretches = [model.tokenize(PREFIX, start=True), *map(model.tokenize, (CONTEXT, QUESTION, ANSWER))]
    prefix = model.prefill(stretches[0], None).cache
    context = model.prefill(stretches[1], prefix, queries=None, attention=True)
    evidence = gather(model, Needs(None, True, True), prefix, context, stretches[2], stretches[3], seed="one")
    return model, [len(ids) for ids in stretches], evidence


def straight_attention(model: LanguageModel, evidence: Evidence, layer: int) -> Tensor:
    """What every token from the context on pays to the context's, in float64: [kv_heads, group, tokens, context].

    The prefix's own tokens, of which nobody keeps the queries, have NaN.
    """
    caches = [evidence.prefix, evidence.cache, evidence.question_cache]
    keys = torch.cat([model.attended(layer, cache.layers[layer])[0] for cache in caches if cache], 1).double()
    assert evidence.prefix and evidence.context_queries and evidence.question_queries
    assert evidence.answer_queries is not None
    queries = torch.cat(
        [
            evidence.context_queries[layer],
            evidence.question_queries[layer],
            evidence.answer_queries[layer][:, 1:],  # the first is the question's last
        ],
        1,
    ).double()
    before = evidence.prefix.length
    scores = queries.unflatten(0, (len(keys), -1)) @ keys[:, None].mT * model.scaling(layer)
    cap = model.softcap(layer)
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    unseen = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(before + 1)
    scores = scores.masked_fill(unseen, -torch.inf)
    if (sinks := model.sinks(layer)) is not None:  # one more key of each head, whose value is nothing
        beside = sinks.double().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, beside], -1)
    weights = scores.softmax(-1)
    weights = weights[..., before : before + evidence.tokens].flatten(0, 1)
    weights = weights.unflatten(0, (evidence.cache.layers[layer].kv_heads, -1))  # as it is cached
    return torch.nn.functional.pad(weights, (0, 0, before, 0), value=torch.nan)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", PRUNED)
def test_scores_of_a_model_in_sixteen_bits_are_those_of_straight_attention(
    tiny_model: Tiny, family: str, dtype: str
) -> None:
    model, counts, evidence = prepared(tiny_model(family), dtype)
    evidence = replace(evidence, context_attention=None)  # which the model sums up in its own format
    layer = evidence.prunable[-1]
    weights = straight_attention(model, evidence, layer).cpu()
    for text, weighing in SCORES.items():
        selector: Any = Codec(text).selector
        expected, found = weighing(weights, *counts), selector.scores(evidence, layer).cpu().double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda m, t=text: f"{t}: {m}")


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", PRUNED)
def test_every_selector_works_on_every_model_in_sixteen_bits(
    tiny_model: Tiny, family: str, dtype: str
) -> None:
    _, counts, evidence = prepared(tiny_model(family), dtype)
    for text in (*SCORES, "expected@0.5", "keynorm@0.5", "window@0.5", "random@0.5"):
        codec = Codec(text)
        kept = codec.select(evidence)
        assert kept.tokens == round(0.5 * counts[1])
        back = decode(codec.encode(evidence.cache, kept))
        assert back.dtype == evidence.cache.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_the_same_rotary_embedding_in_every_format(
    tiny_model: Tiny, family: str, dtype: str
) -> None:
    model, _, evidence = prepared(tiny_model(family), dtype)
    exact = load_model(str(tiny_model(family)), threads=1).knowing_ropes(evidence.cache)
    for ours, theirs in zip(model.knowing_ropes(evidence.cache).layers, exact.layers, strict=True):
        assert (ours.rope is None) == (theirs.rope is None) == family.startswith("deepseek")
        if ours.rope and theirs.rope:
            assert (ours.rope.first, ours.rope.apart) == (theirs.rope.first, theirs.rope.apart)
            assert ours.rope.frequencies == pytest.approx(theirs.rope.frequencies, rel=1e-6)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", LLAMA_SHAPED)
def test_keys_turned_back_are_what_the_projection_gave(tiny_model: Tiny, family: str, dtype: str) -> None:
    model = load_model(str(tiny_model(family)), dtype=dtype, threads=1)
    projected: dict[int, Tensor] = {}
    for layer, block in enumerate(model._network.model.layers):
        source = getattr(block.self_attn, "k_norm", None) or block.self_attn.k_proj
        source.register_forward_hook(lambda m, i, out, layer=layer: projected.__setitem__(layer, out[0]))
    cache = model.prefill(model.tokenize(CONTEXT, start=True), None).cache
    before = dict(projected)
    rounding = 4 * torch.finfo(getattr(torch, dtype)).eps
    for i, layer in enumerate(model.knowing_ropes(cache).layers):
        assert layer.rope is not None
        expected = before[i].float()
        if expected.shape[0] == cache.length:  # not yet brought into heads
            expected = expected.reshape(cache.length, layer.kv_heads, -1).transpose(0, 1)
        expected = expected[:, -layer.tokens :]  # a sliding-window layer holds its window's
        found = layer.rope.turn(layer.keys, layer.positions, back=True)
        assert float((found - expected).abs().max()) < rounding * float(expected.abs().max())
        assert float((layer.keys.float() - expected).abs().max()) > 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("text", ["kvquant(bits=8, outliers=0)", "delta(rope=pre)+int8"])
def test_what_is_sent_of_a_model_in_sixteen_bits_is_what_stood_before_the_rotation(
    tiny_model: Tiny, text: str, dtype: str
) -> None:
    model, _, evidence = prepared(tiny_model("gemma3"), dtype)
    knowing = model.knowing_ropes(evidence.cache)
    codec = Codec(text)
    assert bytes(codec.encode(knowing)) != bytes(codec.encode(evidence.cache))
    for ours, theirs in zip(decode(codec.encode(knowing)).layers, knowing.to("cpu").layers, strict=True):
        largest = float(theirs.keys.float().abs().max())
        assert float((ours.keys.float() - theirs.keys.float()).abs().max()) < 0.05 * largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedding_that_no_payload_can_tell_is_refused_by_name(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    model = load_model(str(tiny_model("llama")), dtype=dtype, threads=1)
    cache = model.prefill([5, 6, 7], None).cache
    monkeypatch.setattr(Rotation, "rope", lambda self, length: None)
    with pytest.raises(UsageError, match=r"model '.*llama': layer 0 turns its keys by no steady frequencies"):
        model.knowing_ropes(cache)
