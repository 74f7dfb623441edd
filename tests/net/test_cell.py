"""A cell's law of motion in logical time, without a kernel, against computations of its own."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError, UsageError
from testbed.experiment.plan import make_plan
from testbed.kinds import parse
from testbed.net.calibration.capacity import Capacity, beyond
from testbed.net.calibration.load import loaded
from testbed.net.emulators.emulator import Wanted
from testbed.net.emulators.netem.netem import Netem
from testbed.net.emulators.relay.cell.cell import Cell
from testbed.net.emulators.relay.conditions import Conditions
from testbed.net.emulators.relay.line import Line
from testbed.net.emulators.relay.userspace import spread
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.trace import parse_trace
from testbed.net.sharing import SCHEDULERS
from testbed.net.topology.files import topology_from
from testbed.net.topology.topology import Topology
from tests.load.test_scenarios import BASE

FRAME = bytes(24 + 1250)  # 10,000 bits behind the headers: 1 ms at 10 Mbit/s
WALK = Path(__file__).parents[2] / "scenarios/traces/cell-walk.csv"


class Bench:
    """A cell of users whose departures are observed in logical time."""

    def __init__(self, scheduler: str, users: list[dict[str, Any]]) -> None:
        self.cell = Cell(parse(scheduler, SCHEDULERS, "scheduler"))
        self.now = 0.0
        self.left: list[list[tuple[float, int]]] = [[] for _ in users]
        self.users = [self.cell.join(self._noting(number), None) for number in range(len(users))]
        for user, conditions in zip(self.users, users, strict=True):
            user.apply(Conditions(**conditions), 0.0)

    def _noting(self, number: int) -> Any:
        return lambda frame: self.left[number].append((self.now, len(frame) - 24))

    def run(self, arrivals: list[tuple[float, int, bytes]], until: float = inf) -> None:
        """Arrivals: when, whose, frame."""
        pending = sorted(arrivals, key=lambda item: item[0])
        while self.cell.leaves < until or pending:
            if pending and pending[0][0] <= self.cell.leaves:
                now, whose, frame = pending.pop(0)
                self.users[whose].enter(frame, now)
                continue
            self.now = self.cell.leaves
            if self.now > until:
                break
            self.cell.advance(self.now)

    def saturate(self, seconds: float, backlog: int = 40) -> np.ndarray:
        """Bytes that each got while none of them ever ran dry."""
        for user in self.users:
            for _ in range(backlog):
                user.enter(FRAME, 0.0)
        while self.cell.leaves <= seconds:
            self.now = self.cell.leaves
            self.cell.advance(self.now)
            for user in self.users:
                while len(user.queue) + len(user.flight) < backlog:
                    user.enter(FRAME, self.now)
        return np.array([user.sent for user in self.users])


RATE = {"rate_bps": 10e6, "queue_bytes": 1 << 30}


def test_those_that_wait_share_equally_and_who_is_alone_has_it_all():
    bench = Bench("equal", [RATE, RATE])
    bench.run([(0.0, 0, FRAME), (0.0, 0, FRAME), (0.0, 1, FRAME)])
    # Half the rate until 2 ms: the first of each; then the last alone at the full rate.
    assert [time for time, _ in bench.left[0]] == pytest.approx([0.002, 0.003])
    assert [time for time, _ in bench.left[1]] == pytest.approx([0.002])


def test_who_comes_in_between_slows_what_is_being_sent():
    bench = Bench("equal", [RATE, RATE])
    bench.run([(0.0, 0, FRAME), (0.0005, 1, FRAME)])
    # 0.5 ms alone leaves half of it, which takes 1 ms at half the rate; the other then has half of its own left.
    assert bench.left[0][0][0] == pytest.approx(0.0015)
    assert bench.left[1][0][0] == pytest.approx(0.002)


def test_what_is_reserved_is_kept_free_for_who_does_not_come():
    bench = Bench("reserved", [RATE] * 4)
    bench.run([(0.0, 2, FRAME)] * 3)
    assert [time for time, _ in bench.left[2]] == pytest.approx([0.004, 0.008, 0.012])


def test_a_cell_that_is_shared_out_anew_goes_on_with_what_is_half_sent():
    bench = Bench("reserved", [RATE] * 2)
    bench.run([(0.0, 0, FRAME), (0.0, 0, FRAME)], until=0.0005)
    bench.cell.follow(parse("model-aware(bytes=[3b, 1b])", SCHEDULERS, "scheduler"), 0.001)
    bench.run([])
    # Half of the first at half the rate in 1 ms; the other half, and then the second, at three quarters of it.
    assert [time for time, _ in bench.left[0]] == pytest.approx(
        [0.001 + 0.5e-3 / 0.75, 0.001 + 1.5e-3 / 0.75]
    )


def test_one_queue_sends_in_the_order_of_arrival_each_at_the_rate_of_its_link():
    bench = Bench("tcp", [RATE, RATE | {"rate_bps": 5e6}])
    bench.run([(0.0, 0, FRAME), (0.0001, 1, FRAME), (0.0002, 0, FRAME)])
    assert bench.left[1][0][0] == pytest.approx(0.003)
    assert [time for time, _ in bench.left[0]] == pytest.approx([0.001, 0.004])


def test_one_queue_has_one_limit_for_all():
    bench = Bench("tcp", [RATE | {"queue_bytes": 3 * 1250}] * 3)
    bench.run([(0.0001 * number, number % 3, FRAME) for number in range(9)])
    # One is being sent and three wait when the fifth comes; nothing else leaves before 1 ms.
    assert sum(len(left) for left in bench.left) == 4
    assert sum(user.counted.dropped_queue for user in bench.users) == 5


def test_by_what_is_to_be_sent_all_meet_a_deadline_that_half_of_them_miss_by_equal_reservations():
    packets, deadline_s = (120, 120, 20, 20), 0.281  # of 1 ms each: together they take 280 ms
    arrivals = [(0.0, whose, FRAME) for whose, count in enumerate(packets) for _ in range(count)]
    ends = {}
    for scheduler in ("reserved", "model-aware(bytes=[150kb, 150kb, 25kb, 25kb])"):
        bench = Bench(scheduler, [RATE] * 4)
        bench.run(arrivals)
        ends[scheduler] = [left[-1][0] for left in bench.left]
    equal, by_bytes = ends.values()
    assert equal == pytest.approx([0.48, 0.48, 0.08, 0.08])
    assert by_bytes == pytest.approx([0.28] * 4)
    assert [sum(end <= deadline_s for end in each) for each in (equal, by_bytes)] == [2, 4]


@pytest.mark.parametrize("scheduler", ["equal", "proportional-fair", "tcp"])
@given(
    gaps=st.lists(st.floats(0, 0.004), min_size=1, max_size=40),
    rate=st.sampled_from([1e6, 10e6, 77e6]),
    delay=st.sampled_from([0.0, 0.013]),
)
def test_who_is_alone_in_a_cell_finds_the_link_that_it_was_promised(
    scheduler: str, gaps: list[float], rate: float, delay: float
):
    conditions: dict[str, Any] = {"rate_bps": rate, "delay_s": delay, "queue_bytes": 20_000}
    arrivals = np.cumsum(gaps)
    bench = Bench(scheduler, [conditions] * 3)
    bench.run([(float(time), 1, FRAME) for time in arrivals])
    left: list[bytes] = []
    line, found = Line(left.append, None), []
    line.apply(Conditions(**conditions), 0.0)
    pending = [float(time) for time in arrivals]
    while pending or line.leaves < inf:
        if pending and pending[0] <= line.leaves:
            line.enter(FRAME, pending.pop(0))
            continue
        now = line.leaves
        line.advance(now)
        found += [now] * len(left)
        left.clear()
    assert [time for time, _ in bench.left[1]] == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("scheduler", ["equal", "proportional-fair", "tcp"])
@given(
    packets=st.lists(
        st.tuples(st.floats(0, 0.05), st.integers(0, 2), st.integers(40, 1500)), min_size=1, max_size=80
    )
)
def test_nothing_is_lost_reordered_or_sent_faster_than_the_medium(
    scheduler: str, packets: list[tuple[float, int, int]]
):
    bench = Bench(scheduler, [RATE] * 3)
    bench.run([(time, whose, bytes(24 + size)) for time, whose, size in packets])
    for number in range(3):
        asked = [size for _, whose, size in sorted(packets, key=lambda p: p[0]) if whose == number]
        assert [size for _, size in bench.left[number]] == asked
    every = sorted(event for left in bench.left for event in left)
    first = min(time for time, _, _ in packets)
    sent = np.cumsum([size for _, size in every])
    assert all(sent <= (np.array([time for time, _ in every]) - first) * 10e6 / 8 + 1e-3)


def test_equal_users_that_always_wait_get_equal_shares_of_all_of_it():
    for scheduler in ("equal", "proportional-fair"):
        got = Bench(scheduler, [RATE] * 5).saturate(4.0)
        assert got.sum() == pytest.approx(4.0 * 10e6 / 8, rel=1e-3)
        assert got.sum() ** 2 / (5 * (got**2).sum()) > 0.999


def test_conditions_that_change_and_users_that_leave_leave_the_others_theirs():
    bench = Bench("equal", [RATE, RATE, RATE])
    for user in bench.users:
        for _ in range(200):
            user.enter(FRAME, 0.0)
    bench.cell.advance(0.03)
    bench.users[0].clear()
    bench.users[1].apply(Conditions(rate_bps=20e6, queue_bytes=1 << 30), 0.03)
    before = [user.sent for user in bench.users]
    bench.cell.advance(0.05)
    bench.users[2].leave()
    bench.cell.advance(0.06)
    got = [user.sent - had for user, had in zip(bench.users, before, strict=True)]
    assert got[0] == 0 and bench.users[0].counted.cleared > 180
    assert got[1] == pytest.approx((0.02 * 0.5 + 0.01) * 20e6 / 8, rel=0.06)
    assert got[2] == pytest.approx(0.02 * 0.5 * 10e6 / 8, rel=0.06)


def proportional_fair(rates: np.ndarray, average_slots: float) -> np.ndarray:
    """Bytes for each user (rows of bytes a second, slot of 1 ms by slot): the textbook's loop, all always waiting."""
    average, total = np.zeros(len(rates)), np.zeros(len(rates))
    for now in rates.T:
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(now > 0, now / average, -1.0)
        best = np.flatnonzero(worth == worth.max())
        served = np.zeros(len(rates))
        chosen = best[np.argmax(now[best])]
        served[chosen] = now[chosen]
        average += (served - average) / average_slots
        total += served / 1000
    return total


def opportunities(directory: Path, users: int, seconds: int) -> list[Path]:
    """Recordings of delivery times, as Mahimahi writes them: rates that walk at random, each user around a mean of its own."""
    chance, paths = np.random.default_rng(5), []
    for user in range(users):
        walk = np.abs(np.cumsum(chance.normal(0, 0.05, seconds * 1000)) + 1) * (0.3 + 0.4 * user)
        times = np.repeat(np.arange(1, seconds * 1000 + 1), chance.poisson(walk))
        paths.append(directory / f"user{user}.up")
        paths[-1].write_text("\n".join(map(str, times)))
    return paths


def the_textbooks(paths: list[Path], seconds: int) -> np.ndarray:
    """What each got of a cell whose users follow these recordings, once it is what the textbook's loop gives each."""
    counted = [
        np.bincount(np.loadtxt(path, dtype=int), minlength=seconds * 1000)[: seconds * 1000] for path in paths
    ]
    expected = proportional_fair(np.stack(counted) * 1.5e6, 1000)
    traces = [parse_trace(f"trace:{path}").schedule("up", None) for path in paths]
    users = [{"schedule": trace, "queue_bytes": 1 << 30} for trace in traces]
    got = Bench("proportional-fair", users).saturate(seconds)
    assert got == pytest.approx(expected, rel=0.02)
    return got


def test_proportional_fair_shares_over_delivery_times_are_the_textbooks(tmp_path: Path):
    got = the_textbooks(opportunities(tmp_path, 4, 4), 4)
    assert got.max() > 1.2 * got.min()  # they are not merely equal


def test_proportional_fair_shares_over_recorded_radio_links_are_the_textbooks(data: Path):
    names = ("ATT-LTE-driving-2016.down", "TMobile-LTE-short.down", "TMobile-LTE-short.up")
    got = the_textbooks([data / "traces" / name for name in names], 4)
    assert got.max() > 1.2 * got.min()


def test_proportional_fair_shares_over_a_recorded_walk_are_the_textbooks():
    seconds, starts = 8, (0, 20, 40)
    table = np.genfromtxt(WALK, delimiter=",", names=True, skip_header=1)
    expected = proportional_fair(
        np.stack(
            [
                table["rate_up_mbps"][
                    np.searchsorted(table["time_s"], start + np.arange(0, seconds, 0.001) + 1e-9, "right") - 1
                ]
                for start in starts
            ]
        )
        * 1e6
        / 8,
        100,
    )
    users = [
        {
            "schedule": parse_trace(f"trace:{WALK}(offset={start}s)").schedule("up", None),
            "queue_bytes": 1 << 30,
        }
        for start in starts
    ]
    got = Bench("proportional-fair(average=100ms)", users).saturate(seconds)
    assert got == pytest.approx(expected, rel=0.02)


def star(scheduler: str, profile: str, edges: int = 4) -> Topology:
    return topology_from(
        {"kind": "cell", "nodes": edges + 1, "profile": profile, "scheduler": scheduler}, "x", "x"
    )


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
@pytest.mark.parametrize("scheduler", ["equal", "proportional-fair"])
def test_tcp_flows_over_equal_links_of_a_cell_share_it_equally(scheduler: str):
    cell = star(scheduler, "rate=40mbit,delay=5ms")
    with Fabric.build(cell, "userspace") as fabric, loaded(fabric, cell.links) as load:
        rates = np.array(list(load.rates_bps(1.0, 3.0).values()))
    assert rates.sum() ** 2 / (4 * (rates**2).sum()) >= 0.98
    assert rates.sum() < 1.05 * 40e6  # it is one medium, not four


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_the_links_of_a_cell_end_one_by_one_and_with_their_network():
    with Fabric.build(star("equal", "rate=40mbit,delay=5ms"), "userspace") as fabric:
        assert len({attachment.process for attachment in fabric._attachments}) == 1
        fabric._attachments[0].detach()
        assert all(fabric.counters(f"radio-{number}")["up"].packets == 0 for number in (2, 3, 4))


def test_an_emulator_that_knows_one_link_at_a_time_refuses_a_cell():
    wanted = [Wanted("l0", "l0a", "l0b", parse_profile("5g-mid"), ("cell", "equal"))]
    with pytest.raises(UsageError, match=r"^emulator netem cannot share out cell cell \(equal\).*userspace$"):
        Netem().attach_all("nowhere", wanted)


def test_the_links_of_a_cell_share_a_relay_however_many_there_are():
    profile = parse_profile("rate=1gbit")
    alone = [Wanted(f"l{number}", "a", "b", profile) for number in range(3)]
    cell = [Wanted(f"l{number}", "a", "b", profile, ("cell", "equal")) for number in range(3, 67)]
    shares = spread([*alone, *cell], 8)
    assert any(set(range(3, 67)) <= set(share) for share in shares)
    assert sorted(number for share in shares for number in share) == list(range(67))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"scheduler": "fair"}, "scheduler 'fair': unknown; there is equal"),
        ({"scheduler": "proportional-fair(slot=2s)"}, ".*slot is 2s, but must be from 125us to 1s"),
        ({"scheduler": "proportional-fair(average=1us)"}, ".*average is 1us, but must be from one slot"),
        ({"profile": "delay=5ms"}, r"links\[0\].profile: up has no rate"),
        ({"profiles": {"radio-2": "delay=5ms,outage:1s@1s"}}, r"links\[1\].profile: up has no rate"),
        ({"nodes": 66}, "cell cell: 65 links in it; a cell has 1 to 64"),
        (
            {"scheduler": "model-aware(bytes=[1mb, 2mb])"},
            "model-aware: bytes has 2 sizes, and the cell 3 links",
        ),
        ({"scheduler": "model-aware(bytes=[1mb, x, 2mb])"}, ".*size"),
        ({"kind": "star"}, "scheduler: a star has none"),
    ],
)
def test_a_cell_that_cannot_be_is_refused_by_its_place(value: dict[str, Any], says: str):
    written = {"kind": "cell", "nodes": 4, "profile": "wan", "scheduler": "equal"} | value
    with pytest.raises(SpecError, match=f"^x.yaml: {says}"):
        topology_from(written, "x.yaml", "x")


def test_cells_are_written_out_where_links_are():
    made = topology_from(
        {
            "nodes": ["a", "b", "c", "d"],
            "links": [
                {"a": "a", "b": "d", "profile": "wan", "cell": "tower"},
                {"a": "b", "b": "d", "profile": "wan", "cell": "tower"},
                {"a": "c", "b": "d", "profile": "wan"},
            ],
            "cells": {"tower": "reserved"},
        },
        "x",
        "x",
    )
    assert [made.alone(link) for link in made.links] == [0.5, 0.5, 1.0]
    with pytest.raises(SpecError, match=r"links\[0\].cell: no cell 'towr'; did you mean 'tower'"):
        topology_from(
            {
                "nodes": ["a", "b"],
                "links": [{"a": "a", "b": "b", "profile": "wan", "cell": "towr"}],
                "cells": {"tower": "equal"},
            },
            "x",
            "x",
        )


def test_a_share_of_a_profile_has_that_share_of_its_rates_and_all_of_its_queue():
    steady = parse_profile("rate=40mbit,delay=20ms,queue=100ms")
    asked = steady.scaled(0.25)
    assert asked.up.rate_bps == 10e6 and asked.queue_bytes("up") == steady.queue_bytes("up") == 500_000
    moving = parse_profile(f"delay=20ms,trace:{WALK}(scale=2)")
    rates = [profile.up.mean_rate_bps("up") for profile in (moving, moving.scaled(0.25))]
    assert rates[1] == pytest.approx(rates[0] / 4)


def test_points_of_a_sweep_differ_by_how_their_cell_is_shared_out(tmp_path: Path):
    found = set()
    for scheduler in ("equal", "tcp"):
        path = tmp_path / "radio.yaml"
        path.write_text(f"{{kind: cell, nodes: 3, profile: wan, scheduler: {scheduler}}}")
        made = make_plan({**BASE, "topology": str(path), "cloud": "cloud", "edges": 2}, "t.yaml")
        assert [edge.link for edge in made.edges] == ["radio-1", "radio-2"]
        found.add(made.cells(0, None)[0].identity(made))
    assert len(found) == 2


def test_a_cell_counts_once_for_what_a_machine_carries():
    known = Capacity({}, "userspace", 1e9, 2e9)
    assert beyond(star("equal", "rate=1gbit", edges=8), known) == []


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_a_network_that_stands_shares_its_cell_out_anew():
    cell = topology_from(
        {"kind": "cell", "nodes": 3, "profile": "rate=20mbit,delay=2ms", "scheduler": "reserved"}, "t", "t"
    )
    with Fabric.build(cell, "userspace") as fabric:
        assert fabric.topology.alone(fabric.topology.links[0]) == 0.5
        fabric.share_out("cell", "model-aware(bytes=[3mb, 1mb])")
        assert [fabric.topology.alone(link) for link in fabric.topology.links] == [0.75, 0.25]
        with loaded(fabric, cell.links) as load:
            large, small = load.rates_bps(1.0, 1.5).values()
        assert large == pytest.approx(3 * small, rel=0.15)
        with pytest.raises(SpecError, match="model-aware: bytes has 1 sizes, and the cell 2 links"):
            fabric.share_out("cell", "model-aware(bytes=[3mb])")
        with pytest.raises(SpecError, match="no cell 'tower'"):
            fabric.share_out("tower", "equal")
