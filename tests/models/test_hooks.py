"""What is hooked to a network for one pass has no part in the passes that other threads make of it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.models.inputs import recorded
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from tests.models.test_prefill import CONTEXT, PREFIX, assert_equal


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> LanguageModel:
    return load_model(str(tiny_model("llama")))


@pytest.fixture
def elsewhere(model: LanguageModel) -> Callable[[], KVCache]:
    """A prefill of the context in another thread."""

    def prefilled() -> KVCache:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: model.prefill(CONTEXT, None).cache).result()

    return prefilled


def test_a_pass_that_shrinks_or_is_given_up_cuts_no_other_threads(
    model: LanguageModel, elsewhere: Callable[[], KVCache]
) -> None:
    alone, made, asked = model.prefill(CONTEXT, None).cache, list[KVCache](), list[bool]()
    before = model.prefill(PREFIX, None).cache

    def wanted(layer: bool) -> int:
        asked.append(layer)
        if asked.count(True) == 1 and layer:  # not those that another thread would be asked for
            made.append(elsewhere())
        return 23

    blocks = model.blocks(CONTEXT, before)
    undisturbed = model.blocks(CONTEXT, before)
    front = blocks.run(len(CONTEXT), wanted)
    assert_equal(front, undisturbed.run(len(CONTEXT), lambda layer: 23))
    assert asked.count(True) == model.num_layers
    for cache in made:
        assert_equal(cache, alone)


def test_what_is_recorded_of_a_pass_is_of_this_thread(
    model: LanguageModel, elsewhere: Callable[[], KVCache]
) -> None:
    with recorded(model._network) as inputs:
        elsewhere()
        assert not inputs.hidden_states
        model.prefill(PREFIX, None)
    assert {states.shape[1] for states in inputs.hidden_states.values()} == {len(PREFIX)}
