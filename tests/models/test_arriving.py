"""Layers that come one after another: read, waited for, missed; and prefills that hand out theirs on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from testbed.errors import LateError, WireError
from testbed.models.arriving import ArrivingCache
from testbed.models.kvcache import KVCache, KVLayer, join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.shrinking import decoder_layers
from tests.models.test_architectures import READ, written
from tests.models.test_prefill import CONTEXT, IDS, PREFIX, QUESTION, assert_equal
from tests.tiny_models import FAMILIES, SHAPES

Tiny = Callable[[str], Path]

OPTIONS = [[9, 30], [4], [200, 7, 7]]


def parts(model: LanguageModel) -> tuple[KVCache, KVCache]:
    before = model.prefill(PREFIX, None).cache
    return before, model.prefill(CONTEXT, before).cache


def in_time(before: KVCache, context: KVCache) -> tuple[ArrivingCache, list[int]]:
    """A cache whose layers come when a pass begins to wait for one; and which had come by then, each time."""
    come: list[int] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        arriving.put(len(come), context.layers[len(come)])
        come.append(len(come))
        yield

    arriving = ArrivingCache(len(context.layers), context.length, before, waiting=waiting)
    return arriving, come


def check(model: LanguageModel) -> None:
    before, context = parts(model)
    past = join(before, context)
    arriving, come = in_time(before, context)
    assert model.generate(QUESTION, arriving, 12, None) == model.generate(QUESTION, past, 12, None)
    assert come == list(range(model.num_layers))
    assert_equal(arriving.whole(), past)
    arriving, _ = in_time(before, context)
    assert model.option_nlls(QUESTION, OPTIONS, arriving) == model.option_nlls(QUESTION, OPTIONS, past)
    arriving, _ = in_time(before, context)
    for one, other in zip(
        model.likelihoods(QUESTION, OPTIONS, arriving),
        model.likelihoods(QUESTION, OPTIONS, past),
        strict=True,
    ):
        assert torch.equal(one, other)
    told: dict[int, KVLayer] = {}
    arriving, _ = in_time(before, context)
    behind = model.prefill(QUESTION, arriving, on_layer=told.__setitem__).cache
    assert list(told) == list(range(model.num_layers))
    assert_equal(KVCache(list(told.values()), behind.length), behind)
    assert_equal(behind, model.prefill(QUESTION, past).cache)


@pytest.mark.parametrize("family", [*FAMILIES, *SHAPES])
def test_a_past_that_arrives_by_layers_is_answered_as_the_whole_one(tiny_model: Tiny, family: str) -> None:
    check(load_model(str(tiny_model(family)), threads=1))


@pytest.mark.parametrize("name", READ)
def test_it_is_in_other_architectures_too(name: str, tmp_path: Path) -> None:
    check(load_model(str(written(tmp_path, *READ[name])), threads=1))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_layers_come_in_any_order_until_the_wanted_one_is_there(
    tiny_model: Tiny, order: tuple[int, ...]
) -> None:
    model = load_model(str(tiny_model("gemma3")), threads=1)
    before, context = parts(model)
    full = [layer.select(torch.arange(index, layer.tokens)) for index, layer in enumerate(context.layers)]
    pruned = KVCache(full, context.length)  # layers of different lengths
    left = list(order)

    @contextmanager
    def waiting() -> Iterator[None]:
        index = left.pop(0)
        arriving.put(index, pruned.layers[index])
        yield

    arriving = ArrivingCache(model.num_layers, context.length, before, waiting)
    answer = model.generate(QUESTION, arriving, 12, None)
    assert answer == model.generate(QUESTION, join(before, pruned), 12, None)


def test_a_layer_that_does_not_come_is_named_and_what_hinders_it_is_told(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")), threads=1)
    _, context = parts(model)
    arriving = ArrivingCache(3, context.length)
    arriving.put(0, context.layers[0])
    with pytest.raises(LateError, match="layer 1 of a cache of 3 layers has not come"):
        model.generate(QUESTION, arriving, 12, None)

    @contextmanager
    def closed() -> Iterator[None]:
        raise WireError("the peer closed the connection")
        yield

    with pytest.raises(WireError, match="closed the connection"):
        model.option_nlls(QUESTION, OPTIONS, ArrivingCache(3, context.length, waiting=closed))


def test_layers_that_do_not_belong_are_refused(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("llama")), threads=1)
    before, context = parts(model)
    arriving = ArrivingCache(3, context.length, before)
    arriving.put(1, context.layers[1])
    for index in (-1, 1, 3):
        with pytest.raises(ValueError, match=f"layer {index} of a cache of 3 layers"):
            arriving.put(index, context.layers[1])
    with pytest.raises(ValueError, match="layer 2: the parts' positions overlap"):
        arriving.put(2, before.layers[2])
    with pytest.raises(ValueError, match="2 layers for a model of 3"):
        model.generate(QUESTION, ArrivingCache(2, 5), 1, None)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek v2"])
def test_layers_are_handed_out_before_the_next_is_computed(tiny_model: Tiny, family: str) -> None:
    model = load_model(str(tiny_model(family)), threads=1)
    events: list[str] = []
    told: list[KVLayer] = []

    def on_layer(index: int, layer: KVLayer) -> None:
        events.append(f"layer {index}")
        told.append(layer)

    for module in decoder_layers(model._network, 3):
        module.register_forward_pre_hook(lambda *_: events.append("next"))
    cache = model.prefill(IDS, None, on_layer=on_layer).cache
    assert events == ["next", "layer 0", "next", "layer 1", "next", "layer 2"]
    assert_equal(KVCache(told, cache.length), cache)
    told[0].keys.mul_(2)  # an ordinary tensor, and a copy
    assert not torch.equal(told[0].keys, cache.layers[0].keys)


def test_a_prefill_in_blocks_hands_out_the_layers_of_all_of_them_at_the_end(tiny_model: Tiny) -> None:
    model = load_model(str(tiny_model("gemma3")), threads=1)
    for stops in ((30,), (30, len(IDS))):
        blocks = model.blocks(IDS, None)
        for stop in stops:
            blocks.run(stop)
        told: dict[int, KVLayer] = {}
        cache = blocks.finish(told.__setitem__).cache
        assert_equal(KVCache([told[index] for index in range(3)], cache.length), cache)
