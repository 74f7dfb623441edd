"""What models tell of their rotary embedding, in plain numbers that a payload carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from testbed.codecs.codec import Codec, decode
from testbed.models.loading import load_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_the_same_token_has_the_same_key_wherever_it_stands_once_it_is_turned_back(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    """The first layer's keys see nothing but the token and its position."""
    model = load_model(str(tiny_model(family)), cache_dtype=torch.float32)
    cache = model.knowing_ropes(model.prefill([5] * 300, None).cache)
    layer = cache.layers[0]
    assert layer.rope is not None
    keys = layer.rope.turn(layer.keys, layer.positions, back=True)
    spread = float((keys - keys[:, :1]).abs().max())
    assert spread < 2e-3 * float(keys.abs().max())
    assert float((layer.keys - layer.keys[:, :1]).abs().max()) > 0.1 * float(keys.abs().max())


def test_what_kvquant_sends_of_a_model_is_rebuilt_without_the_model(
    tiny_model: Callable[[str], Path],
) -> None:
    model = load_model(str(tiny_model("gemma3")))
    plain = model.prefill(list(range(200)), None).cache
    knowing = model.knowing_ropes(plain)
    text = "kvquant(bits=8, outliers=0)"
    back = decode(Codec(text).encode(knowing))
    for ours, theirs in zip(back.layers, plain.layers, strict=True):
        largest = float(theirs.keys.float().abs().max())
        assert float((ours.keys.float() - theirs.keys.float()).abs().max()) < 0.05 * largest


def test_codecs_that_turn_keys_back_ask_the_model_how() -> None:
    for text in ("kvquant", "delta(rope=pre)+int4", "window@0.5+delta(rope=pre)+int8+ans"):
        assert Codec(text).undoes_rope
    for text in ("int4", "delta+int4"):
        assert not Codec(text).undoes_rope
