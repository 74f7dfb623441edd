"""The future of a link's rate: as much can be sent by it as by the schedule that an emulator follows."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.delivery.policies.prediction import Link
from testbed.errors import SpecError
from testbed.net.profile.future import future
from testbed.net.profile.profile import parse_profile


@pytest.mark.parametrize(
    ("text", "since_s", "expected"),
    [
        ("rate=10mbit,delay=5ms", 3.0, [(0.0, 10e6)]),
        ("delay=5ms", 3.0, [(0.0, inf)]),
        ("rate=20mbit,outage:2s@1s", 0.0, [(0.0, 20e6), (1.0, 0.0), (3.0, 20e6)]),
        ("rate=20mbit,outage:2s@1s", 2.5, [(0.0, 0.0), (0.5, 20e6)]),
        ("step:8mbit*2s+2mbit*1s", 0.5, [(0.0, 8e6), (1.5, 2e6), (2.5, 8e6), (4.5, 2e6)]),
        ("step:8mbit*2s+2mbit*1s(end=hold,scale=0.5)", 1.0, [(0.0, 4e6), (1.0, 1e6)]),
    ],
)  # fmt: skip
def test_it_is_what_the_profile_says_from_then_on(
    text: str, since_s: float, expected: list[tuple[float, float]]
) -> None:
    assert future(parse_profile(text), "up", since_s, 5.0) == expected


def test_each_way_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "walk.csv").write_text("time_s,rate_down_mbps,rate_up_mbps\n0,60,6\n4,75,8\n9,48,5\n")
    profile = parse_profile(f"delay=15ms,trace:{tmp_path}/walk.csv")
    assert [future(profile, way, 4.0, 1.0) for way in ("up", "down")] == [[(0.0, 8e6)], [(0.0, 75e6)]]


@given(st.floats(0, 30), st.integers(1, 10_000_000))
def test_what_is_sent_by_it_is_sent_when_the_schedule_says(since_s: float, size: int) -> None:
    profile = parse_profile("sine:1mbit..50mbit*7s")
    schedule = profile.up.schedule("up", 0.0)
    assert schedule is not None
    finished = schedule.finish(since_s, size) - since_s
    assert Link(future(profile, "up", since_s)).finish(0.0, size) == pytest.approx(finished, abs=1e-6)


def test_opportunities_to_send_are_a_rate_of_twenty_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "link.up").write_text("".join(f"{ms}\n" for ms in (0, 5, 10, 15, 100, 100, 1000)))
    profile = parse_profile(f"trace:{tmp_path}/link.up")
    steps = [number for step in future(profile, "up", 0.0, 0.9) for number in step]
    assert steps == pytest.approx([0.0, 2.4e6, 0.02, 0.0, 0.1, 1.2e6, 0.12, 0.0])


def test_a_file_that_is_gone_is_told() -> None:
    with pytest.raises(SpecError, match=r"nowhere\.csv"):
        future(parse_profile("trace:nowhere.csv"), "up")
