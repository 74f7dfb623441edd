"""What a run notes of the emulator's counters, on readings that are known."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from testbed.errors import EndpointError
from testbed.net.emulators.emulator import Counters
from testbed.net.emulators.relay.line import Line
from testbed.net.fabric.accounting import Account

NAMES = [f.name for f in dataclasses.fields(Counters)]


class Readings:
    """Answers with one reading after the other; the way down is always idle."""

    def __init__(self, *up: Counters) -> None:
        self.left = list(up)

    def counters(self, link: str) -> dict[str, Counters]:
        assert link == "access"
        return {"up": self.left.pop(0), "down": Counters(0, 0, 0, 0, 0.0)}


def reading(packets: int, recent_s: float, overrun: int = 0) -> Counters:
    return Counters(packets, 100 * packets, 1, 2, 0.5, packets - 3, overrun, recent_lateness_s=recent_s)


def test_a_trial_has_the_lateness_of_its_own_time_and_what_lies_between_trials_counts_for_none() -> None:
    account = Account(
        Readings(reading(10, 0.4), reading(30, 0.006), reading(90, 0.3), reading(100, 0.004)), "access"
    )
    with account.trial("lte") as first:
        pass
    with account.trial("lte") as second:
        pass
    assert first == ["up: the emulator was late by up to 6ms"]
    assert second == []
    kept = account.record()["lte"]
    assert (kept["trials"], kept["not_kept_up"]) == (2, 1)
    assert (kept["up"]["packets"], kept["up"]["bytes"], kept["up"]["dropped_queue"]) == (30, 3000, 0)
    assert kept["up"]["worst_lateness_s"] == 0.006
    assert set(kept["up"]) == set(NAMES) - {"recent_lateness_s"}


def test_what_was_dropped_between_two_profiles_is_the_first_ones_and_no_loss_of_a_trials() -> None:
    readings = [
        replace(reading(n, 0.0), cleared=cleared) for n, cleared in ((10, 2), (30, 2), (40, 7), (50, 7))
    ]
    account = Account(Readings(*readings), "access")
    with account.trial("lte"):
        pass
    with account.trial("wifi"):
        pass
    kept = account.record()
    assert (kept["lte"]["up"]["cleared"], kept["wifi"]["up"]["cleared"]) == (5, 0)
    assert (kept["lte"]["up"]["packets"], kept["wifi"]["up"]["packets"]) == (20, 10)


def test_packets_that_the_emulator_lost_are_warned_of_also_where_the_trial_fails() -> None:
    account = Account(Readings(reading(10, 0.0), reading(30, 0.0, overrun=7)), "access")
    with pytest.raises(EndpointError), account.trial("lte") as told:
        raise EndpointError("timed out")
    assert told == ["up: the emulator lost 7 packets"]
    assert account.record()["lte"]["up"]["overrun"] == 7


def test_every_counter_is_in_differences_and_sums() -> None:
    first, second = Counters(*range(1, len(NAMES) + 1)), Counters(*range(2, 3 * len(NAMES) + 2, 3))
    for name in NAMES:
        if name.endswith("_s"):
            assert getattr(second.since(first), name) == second.recent_lateness_s
        else:
            assert getattr(second.since(first), name) == getattr(second, name) - getattr(first, name)
            assert getattr(second.plus(first), name) == getattr(second, name) + getattr(first, name)
    assert first.plus(second).worst_lateness_s == second.worst_lateness_s


def test_reading_a_line_begins_its_recent_lateness_anew_and_keeps_its_worst() -> None:
    line = Line(lambda _: None, seed=1)
    line.recent_lateness = 0.007
    assert {k: v for k, v in line.counters().items() if "lateness" in k} == {
        "worst_lateness_s": 0.007,
        "recent_lateness_s": 0.007,
    }
    line.recent_lateness = 0.002
    assert line.counters()["worst_lateness_s"] == 0.007
    assert line.counters()["recent_lateness_s"] == 0.0
