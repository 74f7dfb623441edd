"""Schedules against a straight walk through time: millisecond by millisecond, as one would do it by hand."""

from __future__ import annotations

import tempfile
from array import array
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.schedule import Schedule, unpack

# Segments of whole milliseconds with whole bytes per millisecond: what the walk adds up, it adds up exactly.
segments = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 3) | st.integers(0, 3000)), min_size=1, max_size=8
)
packets = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3000)), min_size=1, max_size=12)


def schedule(parts: list[tuple[int, int]], **options) -> Schedule:
    times, now = [], 0
    for length, _ in parts:
        times.append(now / 1000)
        now += length
    return Schedule(array("d", times), now / 1000, rates=array("f", [r * 1000 for _, r in parts]), **options)


def per_millisecond(parts: list[tuple[int, int]], loop: bool, ms: int) -> int:
    rates = [rate for length, rate in parts for _ in range(length)]
    return rates[ms % len(rates)] if loop or ms < len(rates) else rates[-1]


@given(segments, packets, st.booleans(), st.integers(0, 100))
def test_packets_are_sent_when_a_walk_through_every_millisecond_has_sent_them(parts, arrivals, loop, offset):
    made = schedule(parts, loop=loop, offset_s=offset / 1000, origin_s=5.0)
    free = 0.0  # milliseconds after the origin
    arrival = 0
    for gap, size in arrivals:
        arrival += gap
        begin = max(arrival, free)
        left, ms = size, int(begin)
        part = begin - ms  # of this millisecond, gone already
        for _ in range(100_000):
            rate = per_millisecond(parts, loop, ms + offset)
            if rate * (1 - part) >= left - 1e-6:
                break
            left, ms, part = left - rate * (1 - part), ms + 1, 0.0
        else:
            assert made.finish(5 + begin / 1000, size) == inf
            return
        done = ms + part + (left / rate if rate else 0.0)
        found = made.finish(5 + begin / 1000, size)
        assert found == pytest.approx(5 + done / 1000, abs=1e-7)
        free = (found - 5) * 1000


@given(segments, st.integers(0, 300), st.integers(0, 300), st.booleans())
def test_capacity_is_the_sum_over_every_millisecond(parts, begin, length, loop):
    made = schedule(parts, loop=loop, origin_s=2.0)
    expected = sum(per_millisecond(parts, loop, ms) for ms in range(begin, begin + length))
    assert made.capacity(2 + begin / 1000, 2 + (begin + length) / 1000) == pytest.approx(
        expected, rel=1e-6, abs=1e-3
    )


@given(segments, st.booleans(), st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_a_value_holds_from_its_time_to_the_next_whatever_was_asked_before(parts, loop, asked):
    made = schedule(parts, loop=loop, origin_s=1.0, delays=[r / 10_000 for _, r in parts])
    for ms in asked:
        time = 1 + (ms + 0.5) / 1000
        assert made.rate_at(time) == per_millisecond(parts, loop, ms) * 1000
        assert made.delay_at(time) == pytest.approx(per_millisecond(parts, loop, ms) / 10_000)
        change = made.next_change(time)
        boundaries, now = [], 0
        for length, _ in parts * (400 // sum(length for length, _ in parts) + 1):
            now += length
            boundaries.append(now)
        boundaries = boundaries if loop else boundaries[: len(parts) - 1]
        following = [b for b in boundaries if b > ms]
        assert change == (pytest.approx(1 + following[0] / 1000) if following else inf)


def test_an_outage_makes_what_is_being_sent_wait_and_then_go_on():
    made = schedule([(10, 100), (5000, 0), (10, 100)], loop=False)
    assert made.finish(0.005, 1000) == pytest.approx(5.015)  # half before, half behind


def test_a_rate_without_limit_takes_no_time_and_one_that_never_comes_back_is_never():
    made = Schedule([0.0, 1.0, 2.0], 3.0, rates=[inf, 0.0, inf], loop=False)
    assert made.finish(0.5, 1500) == 0.5
    assert made.finish(1.5, 1500) == 2.0
    assert Schedule([0.0], 1.0, rates=[0.0]).finish(0.0, 1) == inf
    assert Schedule([0.0, 1.0], 2.0, rates=[1.0, 0.0], loop=False).finish(1.0, 1) == inf


def test_before_its_origin_the_first_values_hold():
    made = schedule([(10, 1), (10, 5)], origin_s=100.0)
    assert made.rate_at(3.0) == 1000
    assert made.capacity(99.0, 100.0) == pytest.approx(1000)


def mahimahi(times: list[int], arrivals: list[tuple[int, int]]) -> list[int]:
    """mm-link's own procedure, written out: opportunity by opportunity, millisecond departure of every packet."""
    waiting = [list(item) for item in arrivals]
    left: list[int] = []
    round_, index, in_transit = 0, 0, 0
    while waiting:
        now = round_ * times[-1] + times[index]
        budget = 1500
        while budget and waiting and (in_transit or waiting[0][0] <= now):
            used = min(budget, waiting[0][1])
            budget -= used
            waiting[0][1] -= used
            in_transit = waiting[0][1]
            if not in_transit:
                waiting.pop(0)
                left.append(now)
        index += 1
        if index == len(times):
            round_, index = round_ + 1, 0
    return left


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20).map(sorted).filter(lambda times: times[-1] > 0),
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 1500) | st.just(1500)), min_size=1, max_size=25),
)
def test_deliveries_are_mahimahis(times, gaps):
    arrivals, now = [], 0
    for gap, size in gaps:
        now += gap
        arrivals.append((now, size))
    made, left, free = Deliveries(array("I", times), origin_s=7.0), [], 0.0
    for arrival, size in arrivals:
        free = made.finish(max(7 + arrival / 1000, free), size)
        left.append(round((free - 7) * 1000))
    assert left == mahimahi(times, arrivals)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20).map(sorted).filter(lambda times: times[-1] > 0),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_the_capacity_of_deliveries_counts_opportunities(times, begin, length):
    every = [round_ * times[-1] + time for round_ in range(300) for time in times]
    made = Deliveries(array("I", times), origin_s=3.0)
    expected = 1500 * sum(begin <= time < begin + length for time in every)
    assert made.capacity(3 + begin / 1000, 3 + (begin + length) / 1000) == expected
    assert made.next_change(3 + begin / 1000) == pytest.approx(3 + min(t for t in every if t > begin) / 1000)


@given(segments, st.booleans(), packets)
def test_a_schedule_is_the_same_in_another_process(parts, loop, arrivals):
    first = schedule(parts, loop=loop, scale=0.5, offset_s=0.01, losses=[0.25 for _ in parts])
    with tempfile.TemporaryFile() as file:
        description = first.pack(file)
        file.flush()
        second = unpack(description, file.fileno())
    assert [second.finish(gap, size) for gap, size in arrivals] == [
        first.finish(gap, size) for gap, size in arrivals
    ]
    assert second.loss_at(1.0) == 0.25
    assert second.delay_at(1.0) is None


def test_deliveries_are_the_same_in_another_process():
    with tempfile.TemporaryFile() as file:
        description = Deliveries(array("I", [0, 3, 3, 9]), 750, offset_s=0.004).pack(file)
        file.flush()
        made = unpack(description, file.fileno())
    first = made.finish(0.0, 1500)
    assert (first, made.finish(first, 1500)) == (pytest.approx(0.005), pytest.approx(0.008))


def test_what_next_to_nothing_is_sent_in_is_not_walked_through_round_by_round():
    slow = Schedule([0.0, 0.5], 1.0, rates=[0.0, 1e-6])  # half a microbyte a second
    assert slow.finish(0.0, 1500) == pytest.approx(3e9, rel=1e-6)
    assert slow.finish(0.0, 1e-6) == pytest.approx(2.0)
    assert Schedule([0.0, 0.5], 1.0, rates=[0.0, 5e-324]).finish(0.0, 1500) == inf
    deliveries = Deliveries([1000], 0.0015)
    assert deliveries.finish(0.0, 1500) == pytest.approx(1e6)
