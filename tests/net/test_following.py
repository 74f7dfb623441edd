"""The verdict on a trace's curve, and the flow that measures it, without a network."""

from __future__ import annotations

import pytest

from testbed.net.emulators.schedule import Schedule
from testbed.net.following import Curve, _flow
from testbed.net.profile import parse_profile


def curve(asked: list[float], delivered: list[int]) -> Curve:
    return Curve("up", 0.0, 0.1, tuple(asked), tuple(delivered))


def test_the_correlation_is_pearsons():
    made = curve([1000, 2000, 3000, 4000], [1100, 1900, 3200, 3800])
    # By hand: covariance 4.7e6 over the roots of 5e6 and 4.5e6.
    assert made.correlation == pytest.approx(4.7 / (5.0 * 4.5) ** 0.5)
    assert made.totals == (10_000, 10_000)


def test_shape_and_sum_are_judged_apart_and_by_emulator():
    late = curve([1000, 5000, 1000, 5000], [5000, 1000, 5000, 1000])
    assert [check.ok for check in late.checks("userspace")] == [False, True]
    short = curve([1000, 5000, 1000, 5000], [975, 4875, 975, 4875])
    assert [check.ok for check in short.checks("userspace")] == [True, False]
    assert [check.ok for check in short.checks("netem")] == [True, True]


def test_a_constant_stretch_has_no_shape_to_judge():
    assert [check.ok for check in curve([1000, 1000, 1000], [1200, 800, 1000]).checks("netem")] == [
        None,
        True,
    ]


def test_the_flow_is_faster_than_the_trace_before_and_behind_every_step():
    profile = parse_profile("delay=20ms,step:1mbit*1s+10mbit*1s")
    schedule = profile.up.schedule("up", 0.0)
    assert isinstance(schedule, Schedule)
    flow = _flow(profile, "up", schedule, 1500, 0.0, 2.0)
    offered = {round(until - 0.02, 2): 1500 * 8 / interval for until, interval in flow.pace}
    assert all(rate >= 10e6 for at, rate in offered.items() if at + 0.02 >= 0.95)
    assert all(1.1e6 <= rate <= 2e6 for at, rate in offered.items() if 0.1 <= at <= 0.85)
