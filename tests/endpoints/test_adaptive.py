"""A context whose parts go at levels that a policy chooses: over loopback, with the answers, the counts and what is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

from testbed.codecs.codec import Codec
from testbed.delivery.policies.policy import POLICIES, Policy, Situation
from testbed.endpoints import side
from testbed.endpoints.protocol import Stock, TrialRequest
from testbed.models.kvcache import KVCache, nothing
from testbed.models.loading import load_model
from tests.endpoints.pair import Pair, in_this_process
from tests.tiny_models import FAMILIES

SEEN: list[Situation] = []
#: Those without sliding windows, in which all of what is sent is kept.
FULL = ("llama", "qwen2", "qwen3", "phi3", "gpt neox", "deepseek v2", "deepseek v3")


@dataclass(frozen=True)
class Rotating(Policy):
    """One level after the other; remembers what it was told."""

    name: ClassVar[str] = "rotating"
    source: ClassVar[str] = "a test's"

    first: int = 0

    def choose(self, situation: Situation) -> int:
        if not situation.arrivals and not situation.under_way:
            SEEN.clear()
        SEEN.append(situation)
        return (self.first + len(SEEN) - 1) % len(situation.levels)


@dataclass(frozen=True)
class Foreseeing(Rotating):
    """And wants to know what comes."""

    name: ClassVar[str] = "foreseeing"
    foresees: ClassVar[bool] = True


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(POLICIES, "rotating", f"{__name__}:Rotating")
    monkeypatch.setitem(POLICIES, "foreseeing", f"{__name__}:Foreseeing")
    SEEN.clear()
    yield


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[[str], Path]) -> Pair:
    return in_this_process(tiny_model("llama"))


def adaptive(levels: str, policy: str, chunk: int = 60, deadline: str = "9s") -> str:
    return f"adaptive(levels=[{levels}], deadline={deadline}, policy={policy}, chunk={chunk})"


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_a_lossless_cache_mixed_give_the_answers_of_the_whole_cache(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    pair = in_this_process(tiny_model(family))
    for first, placement in ((0, "split"), (1, "store")):
        whole = pair.ask("fp16")
        kept = pair.outcome(whole)
        mixed = pair.ask(
            "fp16", placement=placement, delivery=adaptive("fp16, text", f"rotating(first={first})")
        )
        outcome = pair.outcome(mixed)
        assert mixed.levels == ",".join((["fp16", "text"] * 3)[first : first + 5])
        assert mixed.chunks == 5 and mixed.tokens_left_out == 0
        assert mixed.answer == whole.answer
        assert outcome.nll == pytest.approx(kept.nll, abs=2e-2)


def test_what_is_left_out_is_counted_and_the_rest_stays_in_its_place(pair: Pair) -> None:
    whole = pair.outcome(pair.ask("fp16"))
    part = pair.ask("fp16", delivery=adaptive("fp16, skip, text", "rotating"))
    assert part.levels == "fp16,skip,text,fp16,skip"
    tokens = whole.tokens_kept
    assert part.tokens_left_out == 60 + (tokens - 240)
    assert pair.outcome(part).tokens_kept == tokens - part.tokens_left_out


@pytest.mark.parametrize("family", FULL)
def test_a_text_behind_what_is_left_out_is_computed_in_its_place(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    pair = in_this_process(tiny_model(family))
    # The first part, the third and the fifth are left out; as a cache the others are where they were.
    cache = pair.outcome(pair.ask("fp16", delivery=adaptive("fp16, skip", "rotating(first=1)")))
    asked = pair.ask("fp16", delivery=adaptive("text, skip", "rotating(first=1)"))
    text = pair.outcome(asked)
    assert asked.levels == "skip,text,skip,text,skip"
    assert (text.tokens_kept, text.kept_digest) == (cache.tokens_kept, cache.kept_digest)


def test_a_text_is_computed_in_its_place_where_no_prefix_stands_before_it(
    tiny_model: Callable[[str], Path],
) -> None:
    model = load_model(str(tiny_model("llama")))
    nowhere = nothing(model.shapes, model.cache_dtype, model.device)
    cache = model.prefill([5, 6, 7], KVCache(nowhere.layers, 40)).cache
    assert cache.length == 43 and cache.layers[0].positions.tolist() == [40, 41, 42]


def test_a_context_of_which_nothing_is_sent_still_has_an_answer(pair: Pair) -> None:
    nothing = pair.ask("fp16", delivery=adaptive("fp16, skip", "fixed(level=1)"))
    outcome = pair.outcome(nothing)
    assert nothing.levels == "skip*5"
    assert nothing.payload_bytes == outcome.tokens_kept == 0
    assert nothing.tokens_left_out == pair.outcome(pair.ask("fp16")).tokens_kept


@pytest.mark.parametrize(("deadline", "met"), [("1min", True), ("1ms", False)])
def test_whether_the_deadline_was_met_is_told(pair: Pair, deadline: str, met: bool) -> None:
    result = pair.ask("int8", delivery=adaptive("int8, int4", "ewma", deadline=deadline))
    assert result.met is met and result.deadline_s == (60.0 if met else 0.001)
    free = pair.ask("int8", delivery="adaptive(levels=[int8, text], chunk=60)")
    assert free.met is None and free.deadline_s is None


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("placement", ["split", "store"])
def test_every_policy_sends_a_whole_context(pair: Pair, policy: str, placement: str) -> None:
    rate = ((0.0, 8e6),) if policy == "oracle" else ()
    delivery = adaptive("int8, q2c@0.5+int4, text", policy)
    result = pair.ask("int8", placement=placement, delivery=delivery, rate=rate)
    assert result.chunks == 5 and result.tokens_left_out == 0
    again = pair.ask("int8", placement=placement, delivery=delivery, rate=rate, replay=True)
    assert again.chunks == 5


def test_a_policy_is_told_what_was_sent_what_came_and_what_is_to_come(pair: Pair) -> None:
    result = pair.ask("int8", delivery=adaptive("int8, text", "foreseeing"), rate=((0.0, None), (1e6, 1.5e6)))
    assert [len(each.chunks) for each in SEEN] == [5, 4, 3, 2, 1]
    assert all(before.now_s <= after.now_s for before, after in pairwise(SEEN))
    assert SEEN[0].levels == ("int8", "text") and SEEN[0].deadline_s == 9.0
    for number, each in enumerate(SEEN):
        known = [*each.arrivals, *each.under_way]
        assert len(known) == number
        assert all(0 <= arrival.sent_s <= arrival.arrived_s <= each.now_s for arrival in each.arrivals)
        assert 0 < each.delay_s < 1
    sent = [span for span in result.spans if span.stage == "transmit"]
    told = [chunk.bytes for chunk in (*SEEN[-1].arrivals, *SEEN[-1].under_way)]
    assert told == [span.bytes for span in sent[:-1]]
    estimated = [
        each.chunks[0][("int8", "text").index(span.level)].bytes
        for each, span in zip(SEEN, sent, strict=True)
    ]
    assert estimated == pytest.approx([span.bytes for span in sent], rel=0.1, abs=200)
    assert SEEN[0].rate is not None
    assert [bps for _, bps in SEEN[0].rate] == [float("inf"), pytest.approx(1.5e6 * 1448 / 1500)]


def test_what_an_answer_tells_of_the_cloud_is_known_to_the_next_request(pair: Pair) -> None:
    delivery = adaptive("int8, text", "rotating")
    pair.ask("int8", delivery=delivery)
    pair.ask("int8", delivery=delivery)
    text, coded = SEEN[0].chunks[0][1], SEEN[0].chunks[0][0]
    assert text.cloud_s > 0 and coded.cloud_s > 0 and SEEN[0].rest_s > 0
    assert text.ready_s == 0 < coded.ready_s


def test_an_edge_whose_cache_is_not_wanted_does_not_hold_the_answer_up(pair: Pair) -> None:
    result = pair.ask("fp16", delivery=adaptive("fp16, text", "fixed(level=1)", chunk=20), reuse="none")
    assert result.levels == "text*15" or result.levels == "text*14"
    assert max(span.end for span in result.spans) == max(s.end for s in result.spans if s.stage == "generate")
    again = pair.ask("fp16", delivery=adaptive("fp16, text", "fixed", chunk=20), reuse="all")
    whole = pair.ask("fp16")
    assert again.answer == whole.answer == result.answer


def test_stored_chunks_are_ready_and_of_known_size(pair: Pair) -> None:
    result = pair.ask("int8", placement="store", delivery=adaptive("int8+zstd, text", "rotating"))
    sent = [span.bytes for span in result.spans if span.stage == "transmit"]
    assert [rungs[0].bytes for rungs in SEEN[0].chunks][::2] == sent[::2]
    assert all(rung.ready_s == 0 for rungs in SEEN[0].chunks for rung in rungs)


@pytest.mark.parametrize("delivery", ["whole", "stream(chunk=64)", "adaptive(levels=[int8, int4], chunk=60)"])
def test_what_was_stocked_is_not_encoded_within_the_trial(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    pair = in_this_process(tiny_model("llama"))
    trial = TrialRequest("store", 0, 1, codec="int8", delivery=delivery, link=pair.link)
    pair.edge.call(Stock(trial), 60)

    def encoded(*_: object, **__: object) -> None:
        raise AssertionError("encoded within the trial")

    monkeypatch.setattr(Codec, "encode", encoded)
    monkeypatch.setattr(Codec, "chunks", encoded)
    result = pair.edge.call(trial, 60)
    assert result.answer_tokens > 0 and result.store_encode_s > 0


@pytest.mark.parametrize("delivery", ["whole", "stream(chunk=64)", "adaptive(levels=[int8, int4], chunk=60)"])
def test_what_is_stocked_at_a_slower_edge_is_timed_by_it_and_not_waited_for(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    pair = in_this_process(tiny_model("llama"), slowdown={"loopback": 1e4})
    trial = TrialRequest("store", 0, 1, codec="int8", delivery=delivery, link=pair.link)
    waits: list[float] = []
    monkeypatch.setattr(side, "wait_until", waits.append)
    pair.edge.call(Stock(trial), 60)
    assert not waits
    assert pair.edge.call(trial, 60).store_encode_s > 1


def test_texts_that_wait_together_are_computed_in_one_pass(pair: Pair) -> None:
    whole = pair.ask("fp16")
    result = pair.ask("fp16", delivery=adaptive("fp16, text", "fixed(level=1)", chunk=20))
    tokens = pair.reference().context_tokens
    passes = [span for span in result.spans if span.stage == "prefill" and span.side == "cloud"]
    assert sum(span.bytes for span in passes) == tokens and len(passes) <= result.chunks
    assert result.answer == whole.answer
