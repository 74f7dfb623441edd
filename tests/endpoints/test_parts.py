"""A context in parts: streamed or stored, it gives the answers that it gives whole."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.endpoints import protocol
from testbed.endpoints.feed import Feed
from testbed.endpoints.protocol import TrialResult
from testbed.errors import EndpointError, PayloadError
from testbed.transport.transport import Stream, parse
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


@pytest.mark.parametrize(
    "codec", ["int8", "q2c@0.25+int4", "window@0.5", "random@0.5+int8+zstd", "kvzip@0.5", "think(keep=0.5)"]
)
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
    asks = codec.startswith(("q2c", "think"))
    stages = {"split": {"prefill", "encode"} | ({"select"} if "@" in codec or "think" in codec else set())}
    stages["store"] = {"select", "encode"} if asks else set()
    assert set(again.reused) == stages[placement]
    assert (again.store_prefill_s > 0) == (placement == "store")


@pytest.mark.parametrize("placement", ["split", "store"])
@pytest.mark.parametrize("delivery", ["stream(chunk=50)", "stream(by=layers, chunk=1)"])
def test_a_part_that_cannot_be_encoded_ends_its_request_at_once_and_is_what_is_said(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, placement: str, delivery: str
) -> None:
    pair = in_this_process(tiny_model("llama"))
    pieces, number = Feed._pieces, itertools.count()

    def failing(feed: Feed, *about: Any) -> Any:
        if next(number) % 2:
            raise PayloadError("values that no codec takes")
        return pieces(feed, *about)

    monkeypatch.setattr(Feed, "_pieces", failing)
    monkeypatch.setattr(Feed, "store", lambda feed: None)  # it is made within the request
    with pytest.raises(PayloadError, match="no codec takes"):  # not that nothing arrived within the timeout
        pair.ask("fp16", placement=placement, delivery=delivery, link={"timeout": 5.0})
    monkeypatch.undo()
    assert pair.ask("fp16", placement=placement, delivery=delivery).answer_tokens


@pytest.mark.parametrize("transport", ["tcp", "quic", "datagram", "datagram(connections=3)"])
def test_the_way_is_what_the_transport_counts_and_not_half_of_what_opening_took(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    kind, delays = type(parse(transport)), []
    connect = kind.connect

    def slowly(*about: Any) -> Stream:
        time.sleep(1.0)
        return connect(*about)

    monkeypatch.setattr(kind, "connect", slowly)
    monkeypatch.setattr(Feed, "begin", lambda feed, at, delay_s: delays.append(delay_s))
    port = pair.cloud.call(protocol.Serve(1 << 22, transport=transport), 10)
    pair.ask("fp16", delivery="stream(chunk=50)", link={"transport": transport, "port": port})
    assert 0 < delays[0] < 0.5


@pytest.mark.parametrize("delivery", ["stream(chunk=8)", "meet(chunk=8)", "adaptive(levels=[fp16], chunk=8)"])
def test_a_context_of_more_parts_than_a_request_has_fails_by_a_line_of_its_own(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    monkeypatch.setattr("testbed.endpoints.feed.MAX_PARTS", 16)
    with pytest.raises(
        EndpointError, match=r"parts of .* tokens, and a request has at most 16: take a larger"
    ):
        pair.ask("fp16", placement="store", delivery=delivery)


@pytest.mark.parametrize("placement", ["split", "store"])
def test_of_a_choice_and_of_a_context_shorter_than_a_chunk_every_delivery_gives_the_answer_of_the_whole(
    tiny_model: Callable[[str], Path], placement: str
) -> None:
    pair = in_this_process(tiny_model("llama"), task="choice")
    ways = [
        "stream(chunk=16)",
        "stream(by=layers, chunk=1)",
        "meet(chunk=16)",
        "adaptive(levels=[fp16], chunk=16)",
    ]
    for example in range(3):
        whole = pair.ask("fp16", example, placement=placement)
        for delivery in (*ways, "stream(chunk=65536)", "stream(by=layers, chunk=99)", "meet(chunk=65536)"):
            assert alike(pair.ask("fp16", example, placement=placement, delivery=delivery), whole), delivery
        planes = pair.ask("planes", example, placement=placement)
        ahead = pair.ask("planes", example, placement=placement, delivery="progressive(planes=2)")
        assert ahead.verified_answer == planes.answer


def test_a_prefill_in_parts_is_shared_where_that_alone_is_to_be_reused(
    tiny_model: Callable[[str], Path],
) -> None:
    pair = in_this_process(tiny_model("llama"))
    for delivery in ("stream(chunk=64)", "stream(by=layers, chunk=1)"):
        first, *others = (pair.ask("q2c@0.5+int8", delivery=delivery, reuse="prefill") for _ in range(3))
        assert (first.reused, first.replayed) == ((), False)
        assert {(again.reused, again.replayed) for again in others} == {(("prefill",), True)}
        assert {again.answer for again in others} == {first.answer}
