"""A recording of a light and a heavy train of packets, replayed: who enters under load travels as long as the heavy one did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError, UsageError
from testbed.net.emulators.netem.support import require_loadless
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.line import Line
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.schedule import Schedule, unpack
from testbed.net.profile.trace import parse_trace

TABLE = (
    "time_s,rate_mbps,delay_ms,loaded_delay_ms\n"
    "0,20,30,45\n0.1,8,25,80\n0.2,30,50,50\n0.3,12,28,33\n0.4,12,28,33\n"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "pair.csv"
    path.write_text(TABLE)
    return path


def expected(table: Path, packets: list[tuple[float, int]]) -> list[float]:
    """When each leaves: a walk with lists, whose rate is added up in steps of the rows."""
    rows = np.genfromtxt(table, delimiter=",", skip_header=1)
    length, edges = 0.5, np.append(rows[:, 0], 0.5)

    def row(time: float) -> np.ndarray:
        return rows[np.searchsorted(rows[:, 0], time % length + 1e-12, "right") - 1]

    def sent(begin: float, size: float) -> float:
        left = size * 8
        while True:
            around = begin - begin % length
            end = around + edges[np.searchsorted(edges, begin % length + 1e-12, "right")]
            rate = row(begin)[1] * 1e6
            if (end - begin) * rate >= left:
                return begin + left / rate
            left -= (end - begin) * rate
            begin = end

    left: list[tuple[float, int]] = []
    arrived = free = 0.0
    for time, size in packets:
        under_way = sum(each for leaves, each in left if leaves > time)
        delay_ms = row(time)[3 if under_way >= 15_000 else 2]
        arrived = max(arrived, time + delay_ms / 1000)
        free = sent(max(arrived, free), size)
        left.append((free, size))
    return [leaves for leaves, _ in left]


def replayed(table: Path, packets: list[tuple[float, int]]) -> list[float]:
    left: list[float] = []
    line = Line(lambda frame: left.append(line.free), None)
    schedule = parse_trace(f"trace:{table}").schedule("up", None)
    line.apply(Conditions(schedule=schedule, queue_bytes=1 << 30), 0.0)
    for time, size in packets:
        line.enter(bytes(24 + size), time)
    while line.leaves < float("inf"):
        line.advance(line.leaves)
    return left


@given(
    gaps=st.lists(st.floats(1e-5, 0.03), min_size=1, max_size=60),
    size=st.sampled_from([100, 1000, 1500]),
    burst=st.integers(1, 15),
)
def test_every_packet_leaves_when_a_walk_by_hand_has_it_leave(
    table: Path, gaps: list[float], size: int, burst: int
):
    times = np.repeat(np.cumsum(gaps), burst)[:150]
    packets = [(float(time), size) for time in times]
    assert replayed(table, packets) == pytest.approx(expected(table, packets), abs=1e-6)


def test_a_light_train_finds_the_idle_delay_and_a_heavy_one_that_under_load(table: Path):
    light = [(0.01 * number, 100) for number in range(10)]
    assert np.array(replayed(table, light)) - [time for time, _ in light] == pytest.approx(0.03004, abs=1e-4)
    heavy = [(0.0005 * number, 1500) for number in range(80)]
    waits = np.array(replayed(table, heavy)) - [time for time, _ in heavy]
    assert waits[0] == pytest.approx(0.0306) and waits[-1] > 0.045


def test_both_delays_cross_to_the_relay_and_only_it_takes_them(table: Path, tmp_path: Path):
    schedule = parse_trace(f"trace:{table}").schedule("up", None)
    assert isinstance(schedule, Schedule)
    with (tmp_path / "packed").open("w+b") as file:
        description = schedule.pack(file)
        file.flush()
        back = unpack(description, file.fileno())
    for time in (0.05, 0.15, 0.37):
        assert back.loaded_delay_at(time) == schedule.loaded_delay_at(time)
    assert schedule.loaded_delay_at(0.15) == pytest.approx(0.08)
    with pytest.raises(UsageError, match=r"^emulator netem cannot tell .* under load.*userspace$"):
        require_loadless(parse_profile(f"trace:{table}"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time_s,rate_mbps,loaded_delay_ms\n0,1,2\n", "line 1: a delay under load"),
        ("time_s,delay_ms,loaded_delay\n0,1,2\n", "line 1: column 'loaded_delay' does not say its unit"),
        ("time_s,delay_ms,loaded_delay_ms\n0,1,-3\n", "line 2: loaded_delay_ms: -3 is out of bounds"),
        ("time_s,delay_ms,loaded_delay_ms\n0,1,x\n", "line 2: loaded_delay_ms: 'x' is not a number"),
        (
            "time_s,delay_ms,loaded_dealy_ms\n0,1,3\n",
            "line 1: unknown column .* did you mean 'loaded_delay_ms'",
        ),
    ],
)
def test_a_pair_that_cannot_be_read_is_refused_by_its_line(tmp_path: Path, text: str, says: str):
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(SpecError, match=says):
        parse_trace(f"trace:{path}").schedule("up", None)
