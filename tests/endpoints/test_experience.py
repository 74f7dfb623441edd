"""What requests took, and what is made of it: passes, margins, slow start."""

from __future__ import annotations

from collections import deque
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.delivery.delivery import Part
from testbed.delivery.policies.margin import Margin
from testbed.delivery.policies.policy import Rung, Situation
from testbed.delivery.policies.prediction import Link, best_level
from testbed.endpoints.arrivals import Arrived
from testbed.endpoints.assembly import Parts
from testbed.endpoints.choosing import let_out
from testbed.endpoints.experience import Experience, Passes
from testbed.endpoints.spans import CLOUD, EDGE, LINK, Span
from testbed.transport import wire


def test_a_pass_is_forecast_by_the_line_through_those_that_were_told() -> None:
    passes = Passes((1000, 2.0))
    assert passes.line() == (0.0, pytest.approx(0.002))  # as this host makes it
    passes.told += [(64, 0.1 + 64 * 0.003), (512, 0.1 + 512 * 0.003)]
    assert passes.line() == (pytest.approx(0.1), pytest.approx(0.003))
    passes.told.clear()
    passes.told += [(64, 0.4), (512, 0.2)]  # a line that would fall says nothing
    assert passes.line() == (0.0, pytest.approx(0.6 / 576))


def test_a_margin_is_what_four_of_five_requests_were_late_by_and_at_most_a_quarter_of_the_deadline() -> None:
    margin = Margin()
    assert margin.seconds() == 0.0
    for late in (0.01, 0.02, 0.03, 0.04, 0.05):
        margin.learn(2.0 - 0.1 + late, 2.0, margin_s=0.1)
    margin.learn(9.0, 2.0, margin_s=0.1)
    assert margin.seconds() == pytest.approx(0.05)
    for _ in range(3):
        margin.learn(9.0, 2.0, margin_s=0.1)
    assert margin.seconds() == 0.5
    for _ in range(10):
        margin.learn(1.0, 2.0, margin_s=0.1)  # no deadline bound it
    assert margin.seconds() == 0.0


def test_a_plan_keeps_the_margin_and_where_it_cannot_is_as_early_as_it_can_be() -> None:
    rungs = (Rung(1_000_000), Rung(900_000), Rung(400_000))

    def level(margin_s: float) -> int:
        asked = Situation(0.0, 1.0, ("a", "b", "c"), (rungs,), margin_s=margin_s)
        return best_level(asked, Link([(0.0, 8e6)]), 1)

    assert [level(0.0), level(0.1), level(0.5), level(0.7)] == [0, 1, 2, 2]


@given(st.floats(0.01, 0.2), st.floats(0.0, 2.0), st.sampled_from([1e6, 2e7, 3e8, inf]))
def test_slow_start_lets_out_what_its_windows_hold_and_no_more_than_the_link(
    rtt: float, since: float, rate: float
) -> None:
    steps = let_out([(0.0, rate), (1.0, rate / 2)], since, rtt)
    link = Link(steps)
    free = Link([(0.0, rate), (1.0, rate / 2)])
    for rounds in (1, 2, 3):
        size = 14_600 * (2**rounds - 1)
        window_ends, alone = since + rounds * rtt, free.finish(since, size)
        assert link.finish(since, size) >= alone - 1e-9
        if rate == inf:
            assert link.finish(since, size) == pytest.approx(window_ends)


def test_of_what_waits_only_texts_that_follow_on_each_other_are_taken_together() -> None:
    request = wire.Request(1, "store", "int8", "", "?", "\n", 1, levels=("int8", "text"), tokens=100)
    parts = Parts.__new__(Parts)
    parts._request = request

    def arrived(index: int, level: int, start: int, stop: int) -> Arrived:
        return Arrived(wire.Chunk(1, index, False, None, level, start, stop), memoryview(b""), 0.0)

    chunks = ((1, 0, 10), (1, 10, 20), (1, 30, 40), (0, 40, 50), (1, 50, 50), (1, 50, 60))
    waiting = deque(arrived(index, *chunk) for index, chunk in enumerate(chunks))
    taken = []
    while waiting:
        taken.append([each.chunk.index for each in parts.next(waiting)])
    assert taken == [[0, 1], [2], [3], [4], [5]]


@pytest.mark.parametrize("last_came", [True, False])
def test_joining_what_came_is_not_taken_for_the_decoding_of_a_last_part_that_never_did(
    last_came: bool,
) -> None:
    parts, levels = [Part("tokens", 0, 100), Part("tokens", 100, 150)], ["int8", "int4"]
    spans = [
        Span("encode", 0.0, 0.2, 0, EDGE),
        Span("transmit", 0.2, 0.5, 0, LINK),
        Span("queue", 0.5, 0.5, 0, CLOUD),
        Span("decode", 0.5, 0.7, 0, CLOUD),
    ]
    if last_came:
        spans += [Span("queue", 1.0, 1.1, 1, CLOUD), Span("decode", 1.1, 1.2, 1, CLOUD)]
    spans += [Span("decode", 2.0, 2.4, 1, CLOUD), Span("first_token", 2.4, 2.5, 1, CLOUD)]
    experience = Experience(Passes((100, 1.0)))
    experience.learn(parts, levels, spans)
    assert experience.encode_s == {"int8": pytest.approx(0.002)}
    assert experience.decode_s.get("int8") == pytest.approx(0.002)
    assert experience.decode_s.get("int4") == (pytest.approx(0.002) if last_came else None)
    assert experience.rest_s(9.0) == pytest.approx(0.5)  # from when all that came was there
