"""How many lanes a machine carries: what is measured, how it is judged and kept, and what is refused by it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.experiment import lanes
from testbed.experiment.lanes import Lanes, Step, counts, held, judged, keep, load_lanes
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.calibration.checks import Check
from testbed.net.fabric.fabric import Fabric

MACHINE = {"kernel": "6.18", "cpu": "one", "cores": 2}
REPLAYED = {
    "model": "shape:llama-3.1-8b",
    "compute": {"edge": "device:m1-max-llama-3.1-8b", "cloud": "device:rtx-4090-llama-3.1-8b"},
}


def plan(**settings: object) -> Plan:
    base = {"name": "lanes", "profiles": ["rate=20mbit,delay=5ms"], "codecs": ["int4"], "tasks": ["needle"]}
    return make_plan({**base, "context_tokens": 128, **REPLAYED, **settings}, "here")


def known(replayed: int = 4, computing: int = 1) -> Lanes:
    step = Step(4, 0.01, 1e-4, 0.0, 1e-3, None, "")
    return Lanes(MACHINE, "userspace", "5g-good", 100e6, replayed, computing, (step,))


def test_lanes_beyond_what_was_measured_are_refused_and_one_never_is() -> None:
    replayed, computes = plan(), plan(model="smollm2-135m", compute={"edge": 4})
    assert held(replayed, 4, known()) == [] and held(computes, 1, known(0, 0)) == []
    with pytest.raises(UsageError, match=r"5 lanes whose compute is replayed: .* carry 4;.*doctor --lanes"):
        held(replayed, 5, known())
    with pytest.raises(UsageError, match="2 lanes that compute: this machine was measured to carry 1"):
        held(computes, 2, known())


def test_where_nothing_was_measured_it_is_said_how_to() -> None:
    for found, emulator in ((None, "auto"), (known(), "netem")):
        (said,) = held(plan(emulator=emulator), 2, found)
        assert "2 lanes" in said and "not measured" in said and "doctor --lanes" in said


def test_links_faster_than_those_that_lanes_were_measured_with_are_remarked_on() -> None:
    assert held(plan(profiles=["rate=100mbit,delay=5ms"]), 4, known()) == []
    (said,) = held(plan(profiles=["rate=1gbit,delay=5ms"]), 4, known())
    assert "1000 Mbit/s" in said and "4 of 100 Mbit/s" in said


@given(st.integers(0, 300))
def test_lanes_are_tried_by_doubling_up_to_the_most(most: int) -> None:
    tried = counts(most)
    assert tried == sorted(set(tried)) and (tried[-1:] == [most] or not most)
    assert all(after <= 2 * before for before, after in itertools.pairwise(tried))


def calibration(rate_bps: float, ok: bool) -> Calibration:
    check = Check(way="up", what="rate", asked=100e6, measured=rate_bps, ok=ok)
    return Calibration("access", "5g-good", "userspace", (Attempt((check,), {}),))


def test_a_lane_is_judged_by_its_worst_link_its_lateness_and_what_computing_took() -> None:
    good, bad = calibration(99e6, True), calibration(90e6, False)
    step = judged(2, [good, good], 1e-3, None)
    assert step.ok and step.rate_error == pytest.approx(-0.01) and step.delay_error_s is None
    step = judged(2, [good, bad], 9e-3, 1.9)
    assert step.rate_error == pytest.approx(-0.1)
    assert "link of lane 2" in step.cause and "9.0 ms late" in step.cause and "1.90 times" in step.cause


def test_what_was_measured_is_kept_for_its_machine_and_a_broken_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "lanes.json"
    assert load_lanes(path, MACHINE) is None
    keep(known(), path)
    assert load_lanes(path, MACHINE) == known() and load_lanes(path, MACHINE | {"cores": 4}) is None
    for text in ("", "[]", "{", "[" * 100_000):
        path.write_text(text)
        assert load_lanes(path, MACHINE) is None


@pytest.mark.netns
@pytest.mark.usefixtures("own_state")
def test_two_lanes_are_measured_while_they_wait_and_while_they_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "_ATTEMPTS", 1)
    monkeypatch.setattr(lanes, "_ALONE_S", 0.5)
    monkeypatch.setattr(lanes, "judged", lambda *found: Step(found[0], 0.0, 0.0, 0.0, found[2], found[3], ""))
    said: list[str] = []
    found = lanes.measure(Fabric.build, MACHINE, said.append, 2, "rate=20mbit,delay=2ms")
    assert [(step.lanes, step.slowdown is None) for step in found.steps] == [
        (1, True),
        (2, True),
        (1, False),
        (2, False),
    ]
    assert (found.replayed, found.computing, found.rate_bps) == (2, 2, 20e6) and len(said) == 4
