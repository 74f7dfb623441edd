from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from testbed.errors import UsageError
from testbed.models.kvcache import KVCache, join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.trail import Trail
from tests.models import reference
from tests.tiny_models import FAMILIES, WINDOW

Tiny = Callable[[str], Path]

PREFIX = "Context: The number of the blue boat is 17.\nQuestion: What is the number?\nAnswer: 17\n\n"
CONTEXT = "Context: The harbour clock was mended in spring by Anna Lind, and the keeper wrote the code 4821."
QUESTION = "\nQuestion: Who mended the clock?\nAnswer:"
NEW = 12


def exact(tiny: Tiny, family: str) -> LanguageModel:
    """A model that rounds nothing, to compare with references of full precision."""
    return load_model(str(tiny(family)), threads=1, cache_dtype=torch.float32)


def parts(model: LanguageModel) -> tuple[list[int], list[int], list[int]]:
    return model.tokenize(PREFIX, start=True), model.tokenize(CONTEXT), model.tokenize(QUESTION)


def past_of(model: LanguageModel, *stretches: list[int]) -> KVCache:
    past: KVCache | None = None
    for ids in stretches:
        cache = model.prefill(ids, past).cache
        past = cache if past is None else join(past, cache)
    assert past is not None
    return past


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_in_stretches_equals_transformers_generate(tiny_model: Tiny, family: str) -> None:
    model = exact(tiny_model, family)
    prefix, context, question = parts(model)
    network = reference.reference_network(tiny_model(family), "eager")
    prompt = torch.tensor([prefix + context + question])
    expected = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[0, prompt.shape[1] :].tolist()
    answer = model.generate(question, past_of(model, prefix, context), NEW, None)
    assert answer == [token for token in expected if token not in model._tokens.ends]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_likelihood_equal_a_whole_forward_pass(tiny_model: Tiny, family: str) -> None:
    model = exact(tiny_model, family)
    prefix, context, question = parts(model)
    answer = model.tokenize(" Anna Lind")
    network = reference.reference_network(tiny_model(family), "eager")
    with torch.no_grad():
        whole = network(torch.tensor([prefix + context + question + answer])).logits[0]
    past = past_of(model, prefix, context)
    ours = model.prefill(question, past).logits
    assert ours is not None
    torch.testing.assert_close(ours, whole[-len(answer) - 1], atol=1e-4, rtol=1e-4)
    chosen = whole[-len(answer) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]
    assert model.nll(question, answer, past) == pytest.approx(float(-chosen.mean()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_sent_to_another_model_answers_bit_for_bit_as_at_home(tiny_model: Tiny, family: str) -> None:
    edge, cloud = (load_model(str(tiny_model(family)), threads=1) for _ in range(2))
    prefix, context, question = parts(edge)
    home = past_of(edge, prefix, context)
    sent = edge.prefill(context, edge.prefill(prefix, None).cache).cache
    assert {layer.keys.dtype for layer in sent.layers} == {torch.float16}
    there = join(cloud.prefill(prefix, None).cache, sent.clone())
    first, second = edge.prefill(question, home).logits, cloud.prefill(question, there).logits
    assert first is not None and second is not None and torch.equal(first, second)
    assert edge.generate(question, home, NEW, None) == cloud.generate(question, there, NEW, None)


def kept_tokens(way: str, cache: KVCache, seed: int) -> list[torch.Tensor]:
    """Half of the context's tokens (of each layer: sliding layers hold fewer), drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, count: int) -> torch.Tensor:
        return torch.randperm(tokens, generator=generator)[:count].sort().values

    if way == "the same everywhere":
        positions = torch.arange(cache.length)
        chosen = positions[torch.rand(cache.length, generator=generator) < 0.5]
        return [torch.isin(layer.positions, chosen).nonzero()[:, 0] for layer in cache.layers]
    if way == "by layer":
        return [draw(n := layer.tokens, n // (2 + index)) for index, layer in enumerate(cache.layers)]
    return [
        torch.stack([draw(layer.tokens, layer.tokens // 2) for _ in range(layer.kv_heads)])
        for layer in cache.layers
    ]


@pytest.mark.parametrize("way", ["the same everywhere", "by layer", "by head"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_a_pruned_cache_equals_full_attention_with_the_dropped_tokens_hidden(
    tiny_model: Tiny,
    family: str,
    way: str,
) -> None:
    model = exact(tiny_model, family)
    prefix, context, question = parts(model)
    before = model.prefill(prefix, None).cache
    full = model.prefill(context, before).cache
    kept = kept_tokens(way, full, seed=len(way))
    past = join(before, full.select(kept))

    total = past.length + len(question) + NEW
    hidden = reference.nothing_hidden(model.num_layers, model.kv_heads, total)
    for index, layer in enumerate(past.layers):
        held = layer.positions.expand(layer.kv_heads, -1)
        for head in range(layer.kv_heads):
            dropped = torch.ones(past.length, dtype=torch.bool)
            dropped[held[head]] = False
            if layer.window is None:
                assert int(dropped.sum()) == len(context) - kept[index].shape[-1]
            hidden[index][head, past.length :, : past.length] = dropped
    network = reference.reference_network(tiny_model(family))
    expected = reference.logits(network, prefix + context + question, hidden)
    ours = model.prefill(question, past).logits
    assert ours is not None
    torch.testing.assert_close(ours, expected[-1], atol=1e-4, rtol=1e-4)
    end = next(iter(model._tokens.ends))
    answer = model.generate(question, past, NEW, None)
    assert answer == reference.greedy(network, prefix + context + question, NEW, hidden, end)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_layers_hand_out_only_what_a_later_query_can_see(tiny_model: Tiny, family: str) -> None:
    model = exact(tiny_model, family)
    prefix, context, _ = parts(model)
    cache = past_of(model, prefix + context)
    for index, layer in enumerate(cache.layers):
        assert layer.window == model.window(index)
        expected = cache.length if layer.window is None else WINDOW - 1
        assert layer.tokens == expected
        assert layer.positions.tolist() == list(range(cache.length - expected, cache.length))


def test_a_prefill_behind_another_holds_its_own_tokens_alone(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    prefix, context, _ = parts(model)
    before = model.prefill(prefix, None).cache
    result = model.prefill(context, before, queries=5)
    start = len(prefix)
    assert result.cache.length == start + len(context)
    assert result.cache.layers[0].positions.tolist() == list(range(start, start + len(context)))
    assert result.cache.nbytes == model.kv_bytes_per_token * len(context)
    assert [tuple(q.shape) for q in result.queries] == [(4, 5, 16)] * model.num_layers
    assert result.query_positions.tolist() == list(range(start + len(context) - 5, start + len(context)))
    assert all(q.shape[1] == len(context) for q in model.prefill(context, before, queries=None).queries)
    assert model.prefill(context, before).queries == []


def test_a_prefill_of_nothing_is_an_empty_cache(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    empty = model.prefill([], None)
    assert empty.cache.length == 0 and empty.cache.nbytes == 0 and empty.logits is None
    ids = model.tokenize(CONTEXT)
    assert model.generate(ids, empty.cache, 5, None) == model.generate(ids, None, 5, None)


def test_generation_ends_before_the_stop_text_and_reports_each_token(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    ids = model.tokenize(CONTEXT)
    free = model.generate(ids, None, 20, None)
    whole = model.text(free)
    printable = re.search(r"[ -~]", whole[3:])  # a random model also writes broken UTF-8
    assert printable is not None
    stop = printable[0]
    told: list[tuple[int, int]] = []
    answer = model.generate(ids, None, 20, stop, on_token=lambda index, token: told.append((index, token)))
    assert told == list(enumerate(answer))
    assert answer == free[: len(answer)] and len(answer) < len(free)
    assert model.text(answer, stop) == whole.partition(stop)[0]
    first = whole[0]
    assert model.generate(ids, None, 20, first) == []
    assert model.generate(ids, None, 0, None) == []


def test_any_text_survives_tokenizing(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    for text in (CONTEXT, "", "  two  spaces\n\n", "naïve — 世界 🚲", "\x00\x7f"):
        assert model.text(model.tokenize(text)) == text
    assert model.tokenize("", start=True) == []


def test_a_start_token_opens_the_prefix_of_models_that_want_one(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("gemma3")))
    plain = model.tokenize(PREFIX)
    assert model.tokenize(PREFIX, start=True) == [0, *plain] and 0 not in plain


def test_a_prompt_longer_than_the_model_is_refused_in_one_line(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    with pytest.raises(UsageError, match=r"4097 tokens is too long .* 4096"):
        model.prefill([5] * 4097, None)
    assert len(model.generate([5] * 4095, None, 10, None)) <= 2


def test_an_ordinary_program_may_change_what_a_prefill_gave_in_place(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")))
    result = model.prefill(model.tokenize(CONTEXT), None, queries=None)
    assert result.logits is not None
    for tensor in (result.cache.layers[0].keys, result.queries[0], result.logits):
        tensor.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_beyond_sixteen_bits_are_cut_to_the_largest(dtype: torch.dtype) -> None:
    from testbed.models.live import LiveCache

    live = LiveCache(None, 1, dtype=dtype, cache_dtype=torch.float16, device=torch.device("cpu"), layers=1)
    large = torch.full((1, 1, 1, 2), 1e6, dtype=dtype)
    keys, values = live.update(large, -large, 0)
    cut = torch.tensor(65504.0).to(dtype).item()
    assert keys.flatten().tolist() == [cut] * 2 and values.flatten().tolist() == [-cut] * 2


@pytest.mark.parametrize("held", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_caches_are_held_in_any_format_whichever_the_model_computes_in(
    tiny_model: Tiny, dtype: str, held: str
) -> None:
    model = load_model(str(tiny_model("llama")), dtype=dtype, threads=1, cache_dtype=getattr(torch, held))
    cache = past_of(model, *parts(model))
    assert cache.dtype == getattr(torch, held)
    assert model.prefill([1, 2], cache).logits is not None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"dtype": "int3"}, "dtype 'int3'"), ({"device": "abacus"}, "device 'abacus'")],
)
def test_a_wrong_device_or_dtype_is_named(
    tiny_model: Tiny, arguments: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_model(str(tiny_model("llama")), **arguments)


def test_an_architecture_that_keeps_no_plain_cache_is_refused(tmp_path: Path) -> None:
    import transformers

    from tests.tiny_models import tiny_tokenizer

    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="mamba"):
        load_model(str(tmp_path))


def test_options_read_behind_one_question_are_as_likely_as_each_read_alone(tiny_model: Tiny) -> None:
    for family in ("llama", "gemma3"):
        model = load_model(str(tiny_model(family)))
        prefix, context, question = parts(model)
        past = join(past_of(model, prefix), model.prefill(context, past_of(model, prefix)).cache)
        options = [model.tokenize(text) for text in (" Anna Lind", " a", " the keeper of the clock", " 4821")]
        alone = [model.nll(question, option, past) for option in options]
        assert model.option_nlls(question, options, past) == pytest.approx(alone, abs=1e-4)
        for option, found in zip(options, model.likelihoods(question, options, past), strict=True):
            assert torch.allclose(found, model.likelihood(question, option, past), atol=1e-4)
        with pytest.raises(ValueError, match="every answer"):
            model.option_nlls(question, [[]], past)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_text_that_begins_as_the_answer_does_is_as_likely_as_read_from_the_question_on_and_read_no_further(
    tiny_model: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_model(family)), threads=1)
    prefix, context, question = parts(model)
    past = join(past_of(model, prefix), model.prefill(context, past_of(model, prefix)).cache)
    answer = model.generate(question, past, NEW, None, trail=(trail := Trail()))
    forward, read = model._forward, list[int]()
    other = [(token + 1) % 300 for token in answer]
    again = [*answer[:4], other[0], other[1] + 1, 7]
    texts = [answer, answer[:1], [*answer[:4], *other], again, other, answer]
    alone = [model.likelihood(question, text, past) for text in texts]
    monkeypatch.setattr(
        model, "_forward", lambda live, ids, **more: read.append(len(ids)) or forward(live, ids, **more)
    )
    for text, expected in zip(texts, alone, strict=True):
        assert torch.allclose(model.likelihood(question, text, past, trail), expected, atol=1e-4)
    assert read == [
        len(other) - 1,
        1,
        len(other) - 1,
        len(answer) - 1,
    ]  # what is not there yet, but for the last token
    assert not Trail()
    assert torch.equal(model.likelihood(question, answer, past, Trail()), alone[0])
