"""How a token bucket is led along a trace, against a bucket of the kernel's kind that is played packet by packet."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.net.emulators.netem.trace_follower import Pace, Pacer
from testbed.net.profile.deliveries import Deliveries
from testbed.net.profile.schedule import Schedule

STEP = 0.008
MTU = 1500


class Bucket:
    """tc-tbf(8) as the kernel plays it: tokens are time, a change fills the bucket, a timer comes *late*."""

    def __init__(self, packets: list[int], late_s: float = 0.0) -> None:
        self.queue, self.late, self.sent = deque(packets), late_s, 0
        self.waiting = sum(packets)
        self.pace = Pace(True, 1, 1)
        self.tokens = self.at = 0.0

    def change(self, pace: Pace, now: float) -> None:
        self.pace = pace
        if not pace.hold:
            self.tokens = pace.burst_bytes / pace.rate_bytes_per_s
            self.at = now

    def run(self, until: float) -> None:
        now = self.at
        while self.queue and not self.pace.hold:
            full = self.pace.burst_bytes / self.pace.rate_bytes_per_s
            needed = self.queue[0] / self.pace.rate_bytes_per_s
            if self.tokens < needed:
                now += needed - self.tokens + self.late
                self.tokens = min(full, self.tokens + now - self.at)
                if now > until:
                    return
                self.at = now
            self.tokens -= needed
            self.sent += self.queue[0]
            self.waiting -= self.queue.popleft()


def follow(schedule: Schedule | Deliveries, bucket: Bucket, seconds: float) -> list[int]:
    """Bytes that left by the end of each step."""
    pacer, sent = Pacer(schedule, MTU, 0.0, 0), []
    for step in range(round(seconds / STEP)):
        now = step * STEP
        bucket.change(pacer.step(now, now + STEP, bucket.sent, bucket.waiting), now)
        bucket.run(now + STEP)
        sent.append(bucket.sent)
    return sent


def full_queue(total: float) -> list[int]:
    return [MTU] * int(total / MTU + 1000)


@pytest.mark.parametrize("late_s", [0.0, 100e-6])
@pytest.mark.parametrize("rate", [20e3, 125e3, 1.25e6, 12.5e6])
def test_what_leaves_is_what_a_constant_trace_has_to_within_a_filling(rate: float, late_s: float) -> None:
    schedule = Schedule([0.0], 1.0, rates=[rate])
    sent = follow(schedule, Bucket(full_queue(rate * 4), late_s), 4.0)
    assert sent[-1] == pytest.approx(rate * 4.0, abs=3 * MTU + rate * 3e-3)


@given(
    rates=st.lists(st.sampled_from([0.0, 10e3, 125e3, 1e6, 5e6]), min_size=2, max_size=8),
    length=st.sampled_from([0.01, 0.05, 0.2]),
)
def test_errors_do_not_add_up_however_the_rate_changes(rates: list[float], length: float) -> None:
    times = [i * length for i in range(len(rates))]
    schedule = Schedule(times, length * len(rates), rates=rates)
    sent = follow(schedule, Bucket(full_queue(5e6)), 1.0)
    most = max(rates) * STEP
    for step, total in enumerate(sent):
        asked = schedule.capacity(0.0, (step + 1) * STEP)
        assert abs(total - asked) <= 3 * MTU + 2 * most


def test_nothing_leaves_in_an_outage_and_what_waits_leaves_afterwards() -> None:
    schedule = Schedule([0.0, 1.0, 2.0], 4.0, rates=[1e6, 0.0, 1e6])
    sent = follow(schedule, Bucket(full_queue(3e6)), 3.0)
    assert sent[round(1.99 / STEP)] == sent[round(1.02 / STEP)]
    assert sent[-1] == pytest.approx(2e6, abs=2 * MTU + 2e6 * STEP)


def test_packet_deliveries_are_followed_as_bytes() -> None:
    schedule = Deliveries([*range(1, 500, 2), 1000], 1500.0)
    sent = follow(schedule, Bucket(full_queue(250 * 1500)), 1.0)
    assert sent[round(0.5 / STEP)] == pytest.approx(schedule.capacity(0, 0.5), abs=3 * MTU)
    assert sent[-1] - sent[round(0.6 / STEP)] <= MTU


def test_what_an_idle_link_could_have_carried_is_gone() -> None:
    schedule = Schedule([0.0], 1.0, rates=[1.25e6])
    pacer, bucket = Pacer(schedule, MTU, 0.0, 0), Bucket([])
    for step in range(200):
        if step == 100:
            bucket.queue.extend(full_queue(1.25e6))
            bucket.waiting = sum(bucket.queue)
        now = step * STEP
        bucket.change(pacer.step(now, now + STEP, bucket.sent, bucket.waiting), now)
        bucket.run(now + STEP)
    assert bucket.sent == pytest.approx(1.25e6 * 100 * STEP, abs=1.25e6 * STEP + 3 * MTU)


def test_a_step_that_came_late_jumps_to_what_the_trace_says_and_makes_up_for_what_waited() -> None:
    schedule = Schedule([0.0, 0.5], 1.0, rates=[1e5, 1e6])
    pacer, bucket = Pacer(schedule, MTU, 0.0, 0), Bucket(full_queue(1e6))
    times = [i * STEP for i in range(62)] + [0.55 + i * STEP for i in range(50)]  # nothing from 0.496 to 0.55
    for now, until in itertools.pairwise(times):
        bucket.change(pacer.step(now, now + STEP, bucket.sent, bucket.waiting), now)
        bucket.run(until)
    assert bucket.sent == pytest.approx(schedule.capacity(0, times[-1]), abs=1e6 * STEP + 3 * MTU)


def test_a_slow_link_lets_a_small_packet_go_without_waiting_for_a_full_ones_time() -> None:
    schedule = Schedule([0.0], 1.0, rates=[20e3])  # 75 ms a full packet, 3.2 ms this one
    pacer = Pacer(schedule, MTU, 0.0, 0)
    assert pacer.step(0.0, STEP, 0, 0).hold
    assert not pacer.step(STEP, 2 * STEP, 0, 64).hold
    assert pacer.step(2 * STEP, 3 * STEP, 64, 1500).hold
