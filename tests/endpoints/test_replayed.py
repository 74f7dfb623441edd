"""A shape's requests on devices that are not here: each pass and token takes at least what was measured, bytes are real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.endpoints.protocol import TrialResult
from testbed.models.shapes import SHAPES
from testbed.speed.times import DeviceTimes
from tests.endpoints.pair import Pair, in_this_process
from tests.models.test_shape import SMALL

#: A pass takes 0.1 s and 0.5 ms a token, a token 20 ms.
TIMES = DeviceTimes("d", "small", ((100, 0.15), (1000, 0.6)), ((100, 0.02), (1000, 0.02)))
TOKENS = 8
CODECS = ("int4", "q2c@0.25+int4")


@pytest.fixture(scope="module")
def pair() -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SMALL)
        return in_this_process("shape:small", times=TIMES)


def answering(result: TrialResult) -> float:
    """The question's pass and the tokens behind the first; where one ends and the other begins, the first token's way decides."""
    return result.stages.first_token_s + result.stages.generate_s


def test_nothing_is_said_of_what_a_shape_answers(pair: Pair) -> None:
    full = pair.reference()
    assert (full.answer, full.nll, full.vocabulary) == ("", None, 0)
    assert full.context_tokens > 200 and full.kv_bytes > 0
    outcome = pair.outcome(pair.ask("int4"))
    assert (outcome.nll, outcome.kl) == (None, None) and outcome.tokens_kept == full.context_tokens


@pytest.mark.parametrize("delivery", ["whole", "stream(chunk=64)", "stream(by=layers, chunk=1)"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("placement", ["split", "store"])
def test_a_cache_that_crosses_is_made_and_read_as_late_as_on_the_devices(
    pair: Pair, codec: str, placement: str, delivery: str
) -> None:
    context = pair.reference().context_tokens
    result = pair.ask(codec, placement=placement, delivery=delivery, replay=True)
    assert answering(result) >= TIMES.pass_s(1) + (TOKENS - 1) * 0.02 and result.answer_tokens == TOKENS
    busy = sum(span.end - span.start for span in result.spans if span.stage == "prefill")
    made = busy if placement == "split" else result.store_prefill_s
    assert made is not None and made >= TIMES.pass_s(context) * 0.999
    assert result.e2e_s >= answering(result) and result.payload_bytes > 0


def test_the_cloud_prefills_a_text_and_the_edge_answers_as_late_as_the_device(pair: Pair) -> None:
    context = pair.reference().context_tokens
    cloud, edge = pair.ask("cloud"), pair.ask("edge")
    for result in (cloud, edge):
        assert result.stages.prefill_s >= TIMES.pass_s(context)
        assert answering(result) >= TIMES.pass_s(1) + (TOKENS - 1) * 0.02


def test_a_longer_prompt_than_was_measured_is_an_error_with_the_devices_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    short = in_this_process("shape:small", times=DeviceTimes("short", "small", ((8, 0.01),), ((8, 0.01),)))
    with pytest.raises(Exception, match="device short: prefill was measured up to 8 tokens"):
        short.ask("edge")


@pytest.mark.parametrize("delivery", ["whole", "stream(chunk=64)", "stream(by=layers, chunk=1)"])
@pytest.mark.parametrize("what", ["int8", "q2c@0.25+int8", "cloud"])
def test_a_real_models_answer_is_computed_beforehand_and_each_token_waited_for(
    tiny_model: Callable[[str], Path], what: str, delivery: str
) -> None:
    slow = in_this_process(tiny_model("llama"), times=TIMES)
    here = in_this_process(tiny_model("llama"))
    about = {} if what == "cloud" else {"delivery": delivery}
    slow.reference()
    rehearsed = slow.ask(what, **about)
    waited = slow.ask(what, replay=True, **about)
    own = here.ask(what, **about)
    assert waited.answer == rehearsed.answer == own.answer
    assert waited.answer_tokens == own.answer_tokens > 1
    assert slow.outcome(waited).kept_digest == here.outcome(own).kept_digest
    assert answering(waited) >= TIMES.pass_s(1) + (waited.answer_tokens - 1) * 0.02
    busy = sum(span.end - span.start for span in waited.spans if span.stage == "prefill")
    assert busy >= TIMES.pass_s(slow.reference().context_tokens) * 0.999
