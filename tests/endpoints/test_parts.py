"""A context in parts: streamed or stored, it gives the answers that it gives whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.endpoints.protocol import TrialResult
from tests.endpoints.pair import Pair, in_this_process
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


def alike(one: TrialResult, other: TrialResult) -> bool:
    return (one.answer, one.answer_tokens) == (other.answer, other.answer_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_stored_a_lossless_cache_gives_the_answers_that_it_gives_whole(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    pair = in_this_process(tiny_model(family))
    for example in range(2):
        whole = pair.ask("fp16", example)
        kept = pair.outcome(whole, example).tokens_kept
        ways = itertools.product(("split", "store"), ("stream(chunk=50)", "stream(by=layers, chunk=1)"))
        for placement, delivery in ways:
            streamed = pair.ask("fp16", example, placement=placement, delivery=delivery)
            assert alike(streamed, whole)
            assert pair.outcome(streamed, example).tokens_kept == kept


@pytest.mark.parametrize("codec", ["int8", "q2c@0.25+int4", "window@0.5", "random@0.5+int8+zstd"])
@pytest.mark.parametrize("placement", ["split", "store"])
@pytest.mark.parametrize("delivery, count", [("stream(chunk=64)", 5), ("stream(by=layers, chunk=2)", 2)])
def test_every_part_is_encoded_by_itself_and_all_that_is_kept_is_there(
    pair: Pair, codec: str, placement: str, delivery: str, count: int
) -> None:
    whole = pair.ask(codec, placement=placement)
    kept = pair.outcome(whole)
    streamed = pair.ask(codec, placement=placement, delivery=delivery)
    parts = pair.outcome(streamed)
    assert (parts.tokens_kept, parts.kept_digest) == (kept.tokens_kept, kept.kept_digest)
    assert (
        streamed.chunks == count and streamed.levels == f"{codec}*{count}" and streamed.tokens_left_out == 0
    )
    again = pair.ask(codec, placement=placement, delivery=delivery)
    assert pair.outcome(again).payload_digest == parts.payload_digest and alike(again, streamed)
    asks = codec.startswith("q2c")
    stages = {"split": {"prefill", "encode"} | ({"select"} if "@" in codec else set())}
    stages["store"] = {"select", "encode"} if asks else set()
    assert set(again.reused) == stages[placement]
    assert (again.store_prefill_s > 0) == (placement == "store")
