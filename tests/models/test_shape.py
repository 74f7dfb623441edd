"""Models that stand in by their shape: sizes against published figures, and what endpoints ask of a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.codecs import registry
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Needs, gather, prefill_for
from testbed.codecs.spec import parse
from testbed.errors import LateError, Stopped, UsageError
from testbed.models.arriving import ArrivingCache
from testbed.models.kvcache import join, seen_from
from testbed.models.loading import load_model
from testbed.models.shape import ShapeModel
from testbed.models.shapes import SHAPES, Shape, find_shape
from testbed.models.sources import find

SMALL = Shape("small", 4, 6, 2, 16, 16, 1000, 4096, 1e6, "nowhere", window=8, sliding=2)
LATENT = Shape("latent", 3, 4, 1, 32, 8, 1000, 4096, 1e6, "nowhere")

#: The study's table of times: MiB of a bf16 cache, of one sample's tokens. Both Qwen models have one tokenizer.
STUDY_MIB = {"qwen2.5-7b": 9.3, "qwen2.5-14b": 31.9}
#: The study's layers and KV heads.
STUDY = {
    "qwen2.5-3b": (36, 2),
    "qwen2.5-7b": (28, 4),
    "qwen2.5-14b": (48, 8),
    "yi-1.5-6b": (32, 4),
    "mistral-7b-v0.3": (32, 8),
    "phi-3.5-mini": (32, 32),
    "pythia-2.8b": (32, 32),
}


@pytest.fixture(params=[SMALL, LATENT], ids=lambda shape: shape.name)
def model(request: pytest.FixtureRequest) -> ShapeModel:
    return ShapeModel(request.param)


def test_the_studys_models_have_its_layers_and_heads_and_their_caches_its_sizes() -> None:
    assert {name: (SHAPES[name].layers, SHAPES[name].kv_heads) for name in STUDY} == STUDY
    tokens = {name: mib * 2**20 / SHAPES[name].kv_bytes_per_token for name, mib in STUDY_MIB.items()}
    assert tokens["qwen2.5-7b"] == pytest.approx(tokens["qwen2.5-14b"], rel=0.005)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shapes_heads_are_shared_evenly_and_it_says_where_its_figures_come_from(shape: Shape) -> None:
    assert shape.heads % shape.kv_heads == 0
    assert "/" in shape.source and len(shape.windows) == shape.layers
    assert find(f"shape:{shape.name}").fetched


def test_gemma_2_sees_all_in_every_other_layer() -> None:
    windows = SHAPES["gemma-2-9b"].windows
    assert windows[:2] == (4096, None) and windows.count(None) == 21


def test_an_unknown_shape_is_one_line_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"unknown shape 'llama-3.1-8'; did you mean shape:llama-3.1-8b"):
        find("shape:llama-3.1-8")
    with pytest.raises(UsageError, match=r"there is qwen2.5-3b"):
        find_shape("shape:")


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.none() | st.integers(0, 90))
def test_a_context_in_blocks_is_the_context_at_once(
    first: int, second: int, behind: int, queries: int | None
) -> None:
    model = ShapeModel(SMALL)
    past, ids = model.prefill(range(behind), None).cache, range(first + second)
    whole = model.prefill(ids, past, queries=queries, attention=True)
    blocks = model.blocks(ids, past, queries=queries, attention=True)
    parts = join(blocks.run(first), blocks.run(first + second))
    finished = blocks.finish()
    for cache in (seen_from(parts, parts.length), finished.cache):
        assert cache.length == whole.cache.length
        for mine, theirs in zip(cache.layers, whole.cache.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
            assert torch.equal(mine.positions, theirs.positions)
    for mine, theirs in ((finished.queries, whole.queries), (finished.attention, whole.attention)):
        assert all(torch.equal(a, b) for a, b in zip(mine or [], theirs or [], strict=True))


def test_what_is_joined_has_its_tokens_and_positions_and_no_memory_of_its_own(model: ShapeModel) -> None:
    parts = [model.prefill(range(30), None).cache]
    kept = model.prefill(range(50), parts[0]).cache.select([torch.arange(3)] * model.num_layers)
    joined, whole = model.join(*parts, kept), join(*parts, kept)
    assert (joined.length, joined.nbytes) == (whole.length, whole.nbytes)
    for mine, theirs in zip(joined.layers, whole.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.values.shape == theirs.values.shape
        assert torch.equal(mine.positions, theirs.positions)
        assert mine.keys.untyped_storage().nbytes() == 2


def test_a_prefill_is_given_up_where_asked_and_a_layer_that_does_not_come_is_named() -> None:
    model = ShapeModel(SMALL)
    blocks = model.blocks(range(9), None)
    with pytest.raises(Stopped):
        blocks.run(4, lambda layer: 0)
    with pytest.raises(ValueError, match="none can end at 4"):
        model.blocks(range(3), None).run(4)
    arriving = ArrivingCache(4, 9)
    with pytest.raises(LateError, match="layer 0"):
        model.generate([1], arriving, 3, None)
    handed: list[int] = []
    model.prefill(range(9), None, on_layer=lambda index, layer: handed.append(index))
    assert handed == [0, 1, 2, 3]


def test_a_cache_has_the_shapes_layers_and_no_two_of_its_tokens_or_layers_are_alike(
    model: ShapeModel,
) -> None:
    cache = model.prefill(model.tokenize("many words " * 100), None).cache
    for layer, shape in zip(cache.layers, model.shapes, strict=True):
        assert (layer.kv_heads, layer.head_dim, layer.values.shape[2]) == (
            shape.kv_heads,
            shape.head_dim,
            shape.value_dim,
        )
        assert layer.keys.dtype == torch.float16 and layer.keys.isfinite().all()
        assert layer.tokens == min(cache.length, (shape.window or cache.length + 1) - 1)
    assert not torch.equal(cache.layers[-1].keys[0], cache.layers[-3].keys[0, -cache.layers[-1].tokens :])
    assert len(set(map(tuple, cache.layers[-1].keys[0, :100].tolist()))) == 100


def test_a_text_is_a_token_a_word_or_six_letters_of_one() -> None:
    model = ShapeModel(SMALL)
    assert len(model.tokenize("The quick brown fox, extraordinarily.")) == 4 + 1 + 3 + 1
    assert model.tokenize("fox fox")[0] != model.tokenize("fox fox")[1] == model.tokenize("fox fox fox")[2]
    assert all(0 <= token < SMALL.vocabulary for token in model.tokenize("naïve “text” of signs §§"))
    assert model.tokenize("") == [] and model.text([1, 2, 3]) == ""


def test_an_answer_is_as_long_as_allowed_and_worth_nothing() -> None:
    model = ShapeModel(SMALL)
    past = model.prefill(range(4000), None).cache
    told: list[tuple[int, int]] = []
    ids = model.generate([1] * 90, past, 32, "\n", lambda *token: told.append(token))
    assert len(ids) == 7 and told == list(enumerate(ids))  # the model's length leaves no more
    assert len(model.generate([1], None, 5, None)) == 5
    assert model.option_nlls([1], [[2], [3]], past) == [0.0, 0.0]
    with pytest.raises(UsageError, match="too long for model 'shape:small'"):
        model.prefill(range(200), past)
    with pytest.raises(UsageError, match="has no likelihood"):
        model.likelihood([1], [2], past)


@pytest.mark.parametrize("name", list(registry.SELECTORS))
def test_every_selector_of_ours_keeps_what_it_is_asked_to_of_a_shape(name: str, model: ShapeModel) -> None:
    codec = Codec(parse(f"{name}@0.25+int4"))
    ids, question = model.tokenize("some words and more " * 60), model.tokenize("what words?")
    prefilled = prefill_for(model, codec.needs, ids, None)
    needs = codec.needs
    evidence = gather(model, needs, None, prefilled, question, question if needs.answer else (), seed=1)
    kept = codec.select(evidence)
    assert kept.tokens == round(len(ids) / 4)
    rebuilt = decode(codec.encode(model.knowing_ropes(prefilled.cache), kept))
    assert rebuilt.length == prefilled.cache.length


def test_a_shape_is_loaded_as_a_model_is_and_only_in_16_bits() -> None:
    model = load_model("shape:qwen2.5-3b", device="cpu")
    assert model.stands_in and model.kv_bytes_per_token == 36 * 2 * 2 * 128 * 2
    with pytest.raises(UsageError, match="dtype 'float32': a shape's values are float16"):
        load_model("shape:qwen2.5-3b", dtype="float32")


def test_what_looks_at_hidden_states_is_refused_and_keys_can_be_turned_back(model: ShapeModel) -> None:
    with pytest.raises(UsageError, match="has no hidden states"):
        prefill_for(model, Needs(context_inputs=True), [1, 2], None)
    known = model.knowing_ropes(model.prefill(range(9), None).cache)
    assert all(layer.rope is not None and layer.rope.fits(layer.head_dim) for layer in known.layers)
    codec = Codec(parse("kvquant"))
    assert decode(codec.encode(known)).length == 9
