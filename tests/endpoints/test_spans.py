"""Spans become stages that tile the request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from testbed.endpoints.protocol import CLOUD, EDGE, LINK, Stages
from testbed.endpoints.spans import PIPELINE, Span, behind, billed, bound, in_turn

STAGE = st.sampled_from(PIPELINE)
ENDS = st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda ends: ends[0] < ends[1])


@given(st.lists(st.builds(lambda stage, ends: Span(stage, *ends), STAGE, ENDS)))
def test_each_instant_is_billed_to_the_latest_stage_at_work_or_to_the_one_waited_for(
    spans: list[Span],
) -> None:
    expected = dict.fromkeys(PIPELINE, 0)
    for second in range(min((s.start for s in spans), default=0), max((s.end for s in spans), default=0)):  # type: ignore[call-overload]
        working = [PIPELINE.index(s.stage) for s in spans if s.start <= second < s.end]
        ahead = [(s.start, PIPELINE.index(s.stage)) for s in spans if s.start > second]
        expected[PIPELINE[max(working) if working else min(ahead)[1]]] += 1
    assert structs.astuple(billed(spans)) == tuple(expected.values())


@given(st.lists(st.builds(Span, STAGE, st.floats(0, 1e5), st.floats(0, 1e5)), min_size=1))
def test_stages_sum_to_the_whole(spans: list[Span]) -> None:
    moments = [moment for s in spans if s.start <= s.end for moment in (s.start, s.end)]
    whole = max(moments) - min(moments) if moments else 0.0
    assert billed(spans).total() == pytest.approx(whole, rel=1e-9, abs=1e-9)


@given(st.dictionaries(STAGE, st.floats(0, 100)), st.floats(0, 1e5))
def test_stages_in_turn_keep_their_times_wherever_they_are(seconds: dict[str, float], start: float) -> None:
    here, there = in_turn(**seconds), [Span("generate", start, start + 1.0)]
    stages = structs.asdict(billed(behind(here, there)))
    seconds = {"generate": 0.0} | seconds
    seconds["generate"] += 1.0
    assert stages == pytest.approx(
        structs.asdict(Stages()) | {f"{stage}_s": taken for stage, taken in seconds.items()}, abs=1e-9
    )


def test_what_a_pipeline_hides_of_a_transmission_is_not_billed() -> None:
    """Two chunks: the second is prefilled while the first crosses, and crosses while the first is decoded."""
    spans = [
        Span("prefill", 0, 2, chunk=0),
        Span("transmit", 2, 5, chunk=0),
        Span("prefill", 2, 4, chunk=1),
        Span("transmit", 5, 8, chunk=1),
        Span("decode", 5, 6, chunk=0),
        Span("decode", 8, 9, chunk=1),
    ]
    assert billed(spans) == Stages(prefill_s=2, transmit_s=5, decode_s=2)


def test_what_is_waited_for_behind_a_moment_counts_from_then_on() -> None:
    """A connection that is there already takes no time, but the request begins with it."""
    assert billed([Span("connect", 1, 1), Span("transmit", 3, 4)]) == Stages(transmit_s=3)


SPAN = st.builds(
    lambda stage, ends, chunk, side: Span(stage, *ends, chunk, side),
    STAGE,
    ENDS,
    st.integers(0, 2),
    st.sampled_from((EDGE, LINK, CLOUD)),
)


@given(st.lists(SPAN, min_size=1), st.integers(0, 40))
def test_an_ideal_pipeline_takes_no_longer_than_the_request_did(spans: list[Span], delay: int) -> None:
    whole = max(s.end for s in spans) - min(s.start for s in spans)
    assert 0 <= bound(spans, delay) <= whole


def test_an_ideal_pipeline_begins_each_part_when_what_it_needs_is_there() -> None:
    spans = [
        Span("prefill", 0, 2, 0, EDGE),
        Span("transmit", 2, 6, 0, LINK),
        Span("prefill", 3, 5, 1, EDGE),  # it could have begun at 2
        Span("transmit", 7, 12, 1, LINK),  # and this at 6, and taken 5
        Span("decode", 6, 7, 0, CLOUD),
        Span("queue", 12, 14, 1, CLOUD),
        Span("decode", 14, 15, 1, CLOUD),
    ]
    assert bound(spans) == 12


def test_a_part_that_crosses_as_text_needs_nothing_that_the_edge_computes_meanwhile() -> None:
    spans = [
        Span("transmit", 0, 1, 0, LINK),
        Span("prefill", 0.5, 20, 0, EDGE),
        Span("prefill", 2, 6, 0, CLOUD),  # it could have begun at 1
        Span("first_token", 6, 8, 0, CLOUD),
        Span("generate", 8, 25, 0, CLOUD),
    ]
    assert bound(spans) == 24


def test_parts_that_overtake_each_other_are_there_when_they_came() -> None:
    spans = [
        Span("transmit", 0, 9, 0, LINK),
        Span("transmit", 1, 4, 1, LINK),
        Span("decode", 4, 5, 1, CLOUD),
        Span("decode", 9, 10, 0, CLOUD),
    ]
    assert bound(spans) == 10
    assert bound(spans[1:3]) == 4
