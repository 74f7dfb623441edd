"""Emulated slower machines, on a clock of our own."""

from __future__ import annotations

import pytest

from testbed.endpoints import side as module
from testbed.endpoints.side import Pace
from testbed.speed.times import DeviceTimes
from testbed.speed.words import Speed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds / 2  # as a sleep that a signal cut short


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.mark.parametrize(("slowdown", "took_s"), [(4.0, 8.0), (1.0, 2.0)])
def test_computing_takes_as_many_times_longer_as_asked(clock: Clock, slowdown: float, took_s: float) -> None:
    pace = Pace(Speed(slowdown))
    started = pace.begin()
    clock.now += 2.0
    assert pace.hold() - started == pytest.approx(took_s)


def test_each_piece_is_stretched_once_and_what_lies_between_is_not(clock: Clock) -> None:
    pace = Pace(Speed(3.0))
    started = pace.begin()
    clock.now += 1.0
    assert pace.hold() - started == pytest.approx(3.0)
    clock.now += 0.5  # sending, which no slower machine does more slowly
    pace.begin()
    clock.now += 2.0
    assert pace.hold() - started == pytest.approx(3.0 + 0.5 + 6.0)


def test_generated_tokens_are_stretched_by_a_factor_of_their_own(clock: Clock) -> None:
    pace = Pace(Speed(2.0, 8.0))
    started = pace.begin()
    for work, took_s in (("prefill", 2.0), ("codec", 2.0), ("decode", 8.0)):
        clock.now += 1.0
        now = pace.hold(work)
        assert now - started == pytest.approx(took_s)
        started = now


def test_a_side_that_cannot_decode_waits_for_no_token(clock: Clock) -> None:
    pace = Pace(Speed(2.0, None))
    started = pace.begin()
    clock.now += 1.0
    assert pace.hold("decode") - started == pytest.approx(1.0)


def test_a_device_takes_its_own_times_for_passes_and_tokens_and_this_hosts_for_coding(clock: Clock) -> None:
    times = DeviceTimes("d", "m", ((100, 2.0), (200, 4.0)), ((100, 0.5), (200, 0.7)))
    pace = Pace(Speed(device="d"), times=times).another()
    started = pace.begin()
    for work, tokens, past, took_s in (
        ("prefill", 150, 0, 3.0),
        ("codec", 0, 0, 0.25),
        ("prefill", 100, 100, 2.0),
        ("decode", 1, 150, 0.6),
    ):
        clock.now += 0.25
        now = pace.hold(work, tokens, past)  # type: ignore[arg-type]
        assert now - started == pytest.approx(took_s)
        started = now


def test_off_the_clock_a_slower_machine_takes_as_long_and_nobody_waits(clock: Clock) -> None:
    waiting, ahead = (Pace(Speed(5.0, 5.0), waits=waits) for waits in (True, False))
    for pace in (waiting, ahead):
        started, before = pace.begin(), clock.now
        clock.now += 2.0
        assert pace.hold() - started == 10.0
        clock.now += 1.0
        assert pace.hold() - started == 15.0
        assert clock.now - before == (15.0 if pace is waiting else 3.0)
