"""What a machine carries: how links are spread over relays, what a measurement says, and what is warned of by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.net.calibration import capacity
from testbed.net.calibration.capacity import LINKS, Capacity, Step, beyond, load_capacity
from testbed.net.calibration.load import loaded
from testbed.net.emulators.emulator import Wanted
from testbed.net.emulators.relay.userspace import LINKS_A_RELAY, spread
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.topology import Link, Node, Topology

MACHINE = {"kernel": "6.18", "cpu": "one", "cores": 2}


def star(*profiles: str) -> Topology:
    leaves = [f"n{number}" for number in range(len(profiles))]
    links = (Link(n, n, "hub", parse_profile(text)) for n, text in zip(leaves, profiles, strict=True))
    return Topology("star", (Node("hub"), *map(Node, leaves)), tuple(links))


def wanted(*profiles: str) -> list[Wanted]:
    return [Wanted(f"l{n}", f"l{n}a", f"l{n}b", parse_profile(text)) for n, text in enumerate(profiles)]


def test_links_share_one_relay_until_their_frames_take_more_than_one_is_given() -> None:
    assert spread(wanted(*["rate=50mbit"] * 16), 2) == [list(range(16))]
    assert spread(wanted(*["rate=500mbit"] * 8), 2) == [list(range(8))]  # in super-packets
    assert spread(wanted(*["rate=500mbit,jitter=1ms,delay=9ms"] * 3), 2) == [[0, 2], [1]]  # in single packets
    assert spread(wanted(*["rate=500mbit,jitter=1ms,delay=9ms"] * 3), 1) == [[0, 1, 2]]
    assert spread(wanted("rate=10gbit"), 2) == [[0]]  # one link has one relay
    assert spread(wanted("delay=1ms", "delay=1ms"), 2) == [
        [0],
        [1],
    ]  # without a limit each may be all that a relay carries


@given(rates=st.lists(st.integers(1, 5000), min_size=1, max_size=600), processors=st.integers(1, 8))
def test_every_link_has_one_relay_none_has_too_many_and_none_has_nothing(
    rates: list[int], processors: int
) -> None:
    profiles = {rate: parse_profile(f"rate={rate}mbit") for rate in set(rates)}
    links = [Wanted(f"l{n}", "a", "b", profiles[rate]) for n, rate in enumerate(rates)]
    shares = spread(links, processors)
    assert sorted(number for share in shares for number in share) == list(range(len(rates)))
    assert all(0 < len(share) <= LINKS_A_RELAY and share == sorted(share) for share in shares)
    assert len(shares) <= max(processors, -(-len(rates) // LINKS_A_RELAY))


def measured(link_bps: float, sum_bps: float) -> Capacity:
    return Capacity(MACHINE, "userspace", link_bps, sum_bps, (Step(1, link_bps, link_bps, 1e-3, True),))


def test_a_rate_beyond_what_was_measured_is_warned_of_for_a_link_and_for_all_together() -> None:
    known = measured(5e9, 2e9)
    assert beyond(star("rate=1gbit", "rate=1gbit", "delay=1ms"), known) == []
    assert beyond(star("up:rate=1mbit;down:rate=10gbit"), known) == [
        "link n0: 10gbit is more than one link was measured to carry on this machine (5gbit)"
    ]
    (all_together,) = beyond(star("rate=1gbit", "rate=1gbit", "rate=500mbit"), known)
    assert all_together.startswith("3 links of 2.5gbit together: more than") and "(2gbit)" in all_together
    # One link was measured to carry what it has to; several would not be beyond it by standing beside idle ones' rates.
    assert beyond(star("rate=5gbit"), known) == []


def test_without_a_measurement_nothing_is_guessed_and_fast_links_are_told_so() -> None:
    assert beyond(star("rate=1gbit"), None) == []
    for known, emulator in ((None, "auto"), (measured(5e9, 5e9), "netem")):
        (said,) = beyond(star("rate=1gbit", "rate=1gbit"), known, emulator)
        assert "links of 2gbit together" in said and "was not measured" in said and "doctor --links" in said


def test_a_measurement_is_read_back_on_its_machine_alone_and_a_broken_file_is_none(tmp_path: Path) -> None:
    import msgspec

    path, known = tmp_path / "capacity.json", measured(5e9, 2e9)
    assert load_capacity(path, MACHINE) is None
    path.write_bytes(msgspec.json.encode(known))
    assert load_capacity(path, MACHINE) == known
    assert load_capacity(path, MACHINE | {"kernel": "6.19"}) is None
    for text in ("", "[]", "{", json.dumps({"machine": {}, "emulator": 1}), "[" * 100_000):
        path.write_text(text)
        assert load_capacity(path, MACHINE) is None
    assert str(measured(0, 2e9)) == f"userspace: one link less than 100mbit, {LINKS} links together 2gbit"


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_a_machine_is_measured_by_more_and_more_until_it_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "RATES_BPS", (20e6, 90e9))  # nothing carries the second
    monkeypatch.setattr(capacity, "_ATTEMPTS", 1)
    monkeypatch.setattr(capacity, "_SETTLE_S", 0.5)
    monkeypatch.setattr(capacity, "_SECONDS", 0.3)
    monkeypatch.setattr(capacity, "LATE_S", 1.0)
    said: list[str] = []
    found = capacity.measure(Fabric.build, MACHINE, said.append)
    assert found.emulator in ("userspace", "netem") and found.machine == MACHINE
    assert [(step.links, step.asked_bps) for step in found.steps] == [
        (links, rate) for links in (1, LINKS) for rate in (20e6, 90e9)
    ]
    assert [step.ok for step in found.steps][1::2] == [False, False]
    assert len(said) == 4 and said[1].endswith("too much")


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_a_flow_up_each_link_fills_it_and_nothing_is_left_of_it() -> None:
    import threading

    threads = threading.active_count()
    topology = star("rate=8mbit,delay=2ms", "rate=2mbit,delay=2ms")
    with Fabric.build(topology, "auto") as fabric:
        with loaded(fabric, topology.links) as load:
            rates = load.rates_bps(0.5, 1.5)
        assert threading.active_count() == threads
        passed = {link.name: fabric.counters(link.name)["up"].bytes for link in topology.links}
    assert set(rates) == {"n0", "n1"} and all(rates.values())
    assert passed["n0"] > load.received["n0"] > load.received["n1"] > 0
