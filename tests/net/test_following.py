"""The verdict on a trace's curve, and the flow that measures it, without a network."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest

from testbed.net.calibration import prober
from testbed.net.calibration.outcome import Curve
from testbed.net.calibration.probes import Flow, _plan
from testbed.net.calibration.traces import _applied, _flow
from testbed.net.emulators.netem.netem import Netem
from testbed.net.emulators.relay.userspace import Userspace
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.schedule import Schedule


def curve(asked: list[float], delivered: list[int]) -> Curve:
    return Curve("up", 0.0, 0.1, tuple(asked), tuple(delivered))


def test_the_correlation_is_pearsons():
    made = curve([1000, 2000, 3000, 4000], [1100, 1900, 3200, 3800])
    # By hand: covariance 4.7e6 over the roots of 5e6 and 4.5e6.
    assert made.correlation == pytest.approx(4.7 / (5.0 * 4.5) ** 0.5)
    assert made.totals == (10_000, 10_000)


def test_shape_and_sum_are_judged_apart_and_by_emulator():
    late = curve([1000, 5000, 1000, 5000], [5000, 1000, 5000, 1000])
    assert [check.ok for check in late.checks(Userspace)] == [False, True]
    short = curve([1000, 5000, 1000, 5000], [975, 4875, 975, 4875])
    assert [check.ok for check in short.checks(Userspace)] == [True, False]
    assert [check.ok for check in short.checks(Netem)] == [True, True]


def test_a_constant_stretch_has_no_shape_to_judge():
    assert [check.ok for check in curve([1000, 1000, 1000], [1200, 800, 1000]).checks(Netem)] == [
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


def test_a_flow_is_in_step_with_the_trace_however_late_its_sender_is_told():
    fast_then_slow = Flow(10_000, 200, 1e-3, 5.5, catch_up=True, pace=((5.0, 1e-3), (6.0, 0.1)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 9))
        late = replace(fast_then_slow, begin_s=time.monotonic() - 5.0)
        assert 1 <= prober.send(sock, _plan(late, 1))["sent"] <= 7  # what has passed is not made up for
        begin = time.monotonic() + 0.1
        assert prober.send(sock, _plan(replace(late, begin_s=begin, duration_s=0.1), 2))["sent"] <= 101
        assert time.monotonic() >= begin + 0.09


def test_a_trace_whose_start_took_too_long_is_started_again():
    origins: list[float] = []

    def apply(origin_s: float) -> None:
        origins.append(origin_s)
        if len(origins) == 1:
            time.sleep(0.4)

    start = _applied(apply, 2.0)
    assert len(origins) == 2
    assert start == origins[-1] + 2.0
    assert start - origins[0] - 2.0 >= 0.4


def test_a_trace_that_was_ready_in_time_is_started_once():
    origins: list[float] = []
    assert _applied(origins.append, 0.0) == origins[0]
    assert len(origins) == 1
