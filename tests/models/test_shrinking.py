"""A prefill whose last tokens are dropped between its layers, as they come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.errors import Stopped
from testbed.models.kvcache import join, seen_from
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.shape import ShapeModel
from testbed.models.shrinking import Wanted
from tests.models.test_architectures import READ, written
from tests.models.test_prefill import CONTEXT, NEAR, PREFIX, QUESTION, assert_equal, distance
from tests.models.test_shape import SMALL
from tests.tiny_models import FAMILIES, SHAPES

Tiny = Callable[[str], Path]
_USUAL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip

OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_USUAL,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 400,
            "sliding_window": 8,
        },
    ),
    "beam": ("BeamConfig", {**_USUAL, "moe_intermediate_size": 32}),
    # Layers that attend to what earlier ones cached are given other numbers of tokens by transformers itself.
    **{name: READ[name] for name in ("gemma3n_text", "gemma4_text")},
}


def wanted(*stops: int) -> Wanted:
    """What is wanted before each layer; from the last one on, that."""
    left = list(stops)
    return lambda layer: left.pop(0) if layer and len(left) > 1 else left[0]


def check(model: LanguageModel) -> None:
    before = model.prefill(PREFIX, None).cache
    blocks = model.blocks(CONTEXT, before)
    front = blocks.run(len(CONTEXT), wanted(*[len(CONTEXT)] * (model.num_layers - 2), 41, 23))
    assert blocks.done == 23 and front.length == before.length + 23
    assert [layer.tokens for layer in front.layers] == [23] * model.num_layers
    near = NEAR[model.cache_dtype]
    at_once = model.prefill(CONTEXT[:23], before)
    assert distance(seen_from(front, front.length), at_once.cache) <= near
    # It goes on behind what is left, and shrinks there, too.
    blocks.run(len(CONTEXT), wanted(50, 30))
    assert blocks.done == 30
    finished, whole = blocks.finish(), model.prefill(CONTEXT, before)
    assert distance(finished.cache, whole.cache) <= near
    answers = [model.generate(QUESTION, join(before, one.cache), 12, None) for one in (finished, whole)]
    assert answers[0] == answers[1]
    torch.testing.assert_close(finished.logits, whole.logits, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("held", ["float16", "float32"])
@pytest.mark.parametrize("family", [*FAMILIES, *SHAPES])
def test_what_is_left_of_a_pass_is_what_a_pass_over_it_alone_gives(
    tiny_model: Tiny, family: str, held: str
) -> None:
    check(load_model(str(tiny_model(family)), threads=1, cache_dtype=getattr(torch, held)))


@pytest.mark.parametrize("name", [name for name in READ if name not in OTHERWISE])
def test_passes_of_other_architectures_shrink_too(name: str, tmp_path: Path) -> None:
    check(load_model(str(written(tmp_path, *READ[name])), threads=1))


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_pass_of_an_architecture_whose_layers_take_no_fewer_tokens_stays_whole(
    name: str, tmp_path: Path
) -> None:
    """One holds several streams of hidden states in front of the tokens, the other scales the tokens in four dimensions."""
    model = load_model(str(written(tmp_path, *OTHERWISE[name])), threads=1)
    blocks, calm = model.blocks(CONTEXT, None), model.blocks(CONTEXT, None)
    assert_equal(blocks.run(60, wanted(60, 41, 23)), calm.run(60))
    assert blocks.done == 60
    with pytest.raises(Stopped):
        blocks.run(len(CONTEXT), lambda layer: 60)
    assert_equal(blocks.finish().cache, calm.finish().cache)


@pytest.mark.parametrize("tokens", [2, 3, 4, 16, 64])  # as many as layers, heads, widths
def test_what_happens_to_be_as_long_as_the_pass_is_left_as_it_is(tiny_model: Tiny, tokens: int) -> None:
    model = load_model(str(tiny_model("gemma2")), threads=1)
    blocks = model.blocks(CONTEXT[:tokens], None)
    cut = blocks.run(tokens, wanted(tokens, 1, 1))
    assert (
        blocks.done == 1 and distance(cut, model.blocks(CONTEXT[:1], None).run(1)) <= NEAR[model.cache_dtype]
    )


def test_a_block_of_which_nothing_is_wanted_is_given_up_and_may_be_run_again(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("gemma3")), threads=1)
    blocks, calm = model.blocks(CONTEXT, None), model.blocks(CONTEXT, None)
    assert_equal(blocks.run(30), calm.run(30))
    with pytest.raises(Stopped):
        blocks.run(60, wanted(50, 30))
    assert blocks.done == 30
    assert_equal(blocks.run(50), calm.run(50))
    assert_equal(blocks.finish().cache, calm.finish().cache)


def test_a_block_is_given_up_within_a_layer_too(tiny_model: Tiny) -> None:
    blocks = load_model(str(tiny_model("llama")), threads=1).blocks(CONTEXT, None)
    asked: list[bool] = []

    def wanted(layer: bool) -> int:
        asked.append(layer)
        return len(CONTEXT) if layer or len(asked) < 5 else 0

    with pytest.raises(Stopped):
        blocks.run(len(CONTEXT), wanted)
    assert asked == [True, False, False, False, False] and blocks.done == 0


def test_a_pass_that_is_left_as_it_is_gives_the_same_bits(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("gemma3")), threads=1)
    assert_equal(model.blocks(CONTEXT, None).run(40, lambda layer: 99), model.blocks(CONTEXT, None).run(40))


@pytest.mark.parametrize("gathered", [{"queries": 5}, {"attention": True}, {"inputs": True}])
def test_a_block_that_may_shrink_gathers_nothing(tiny_model: Tiny, gathered: dict[str, int]) -> None:
    model = load_model(str(tiny_model("llama")), threads=1)
    blocks = model.blocks(CONTEXT, None, **gathered)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gathers nothing"):
        blocks.run(len(CONTEXT), lambda layer: 9)
    assert blocks.done == 0


def test_a_shapes_blocks_shrink_as_a_models_do() -> None:
    model = ShapeModel(SMALL)
    blocks = model.blocks(range(20), None)
    assert_equal(blocks.run(20, wanted(20, 12, 9)), model.blocks(range(9), None).run(9))
    with pytest.raises(Stopped):
        blocks.run(20, wanted(9))
    assert blocks.done == 9 and blocks.finish().cache.length == 20
