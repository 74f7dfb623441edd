"""More edges than a machine carries faithfully are refused, by links measured while the others are full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.experiment import full_load
from testbed.experiment.full_load import Contended, Full
from testbed.experiment.plan import make_plan
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.fabric.fabric import Fabric
from tests.load.test_scenarios import BASE

pytestmark = [pytest.mark.netns, pytest.mark.slow]


def measured(**changes: Any) -> Any:
    plan = make_plan({**BASE, **changes}, "t.yaml")
    with Fabric.build(plan.under(plan.profiles[0]), "userspace") as fabric:
        return full_load.measured(fabric, plan), {
            edge.node: fabric.counters(edge.link)["up"].bytes for edge in plan.edges
        }


def test_one_edges_link_is_measured_while_all_others_are_full() -> None:
    found, sent = measured(edges=4, profiles=["rate=20mbit,delay=5ms"])
    assert found.calibration.link == "n1-hub"
    assert {check.what for check in found.calibration.checks} >= {"rate", "delay", "loss"}
    assert found.asked_bps == pytest.approx(3 * 20e6 * 1448 / 1500) and found.carried_bps > 0
    assert all(sent[name] > 1_000_000 for name in ("n2", "n3", "n4"))


def test_edges_behind_one_bottleneck_fill_that_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "{kind: shared-bottleneck, nodes: 4, profile: 'rate=100mbit,delay=2ms', bottleneck: 'rate=30mbit,delay=5ms'}"
    )
    found, sent = measured(topology=str(path), cloud="cloud", edges=3, profiles=["rate=30mbit,delay=5ms"])
    assert found.calibration.link == "access-1" and found.asked_bps is None
    # Behind the bottleneck two flows came to no more than its rate for as long as measuring took, where their links carry more.
    assert 500_000 < sum(sent[name] for name in list(sent)[1:]) < 12 * 30e6 / 8


@pytest.mark.parametrize("scheduler", ["equal", "proportional-fair", "tcp"])
def test_a_cell_for_which_links_contend_is_measured_while_all_of_its_edges_send(
    tmp_path: Path, scheduler: str
) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text(f"{{kind: cell, nodes: 4, profile: 'rate=30mbit,delay=5ms', scheduler: {scheduler}}}")
    changes = {"topology": str(path), "cloud": "cloud", "edges": 3, "profiles": ["rate=30mbit,delay=5ms"]}
    plan = make_plan({**BASE, **changes}, "t.yaml")
    with Fabric.build(plan.under(plan.profiles[0]), "userspace") as fabric:
        found = full_load.contended(fabric, plan)
        fabric.share_out("cell", "reserved")
        assert full_load.contended(fabric, plan) is None
    assert found is not None and found.asked_bps is not None
    assert found.alike == (scheduler == "equal")
    assert set(found.carried_bps) == {"radio-1", "radio-2", "radio-3"}
    assert sum(found.asked_bps.values()) == pytest.approx(30e6 * 1448 / 1500)
    assert 0 < sum(found.carried_bps.values()) < 1.1 * 30e6


def test_a_cell_falls_short_by_what_all_came_to_or_where_parts_are_alike_by_one() -> None:
    asked = {"a": 10e6, "b": 10e6}
    assert Contended("c", {"a": 14e6, "b": 5e6}, asked, False).ok
    assert Contended("c", {"a": 1e6, "b": 1e6}, None, True).ok
    short = Contended("c", {"a": 14e6, "b": 5e6}, asked, True)
    assert short.cause == "b came to 5mbit of its part, 10mbit"
    together = Contended("c", {"a": 10e6, "b": 7e6}, asked, False)
    assert together.cause == "they came to 17mbit of the 20mbit that the cell carries"
    assert together.to_dict()["ok"] is False


def test_what_the_others_came_to_decides_too() -> None:
    kept = Calibration("n1-hub", "p", "userspace", (Attempt((), {}),))
    assert Full(kept, 95e6, 100e6).ok and Full(kept, 5e6, None).ok
    short = Full(kept, 40e6, 100e6)
    assert not short.ok and short.cause == "the others came to 40mbit of the 100mbit that fill them"


def test_who_is_alone_or_has_links_without_a_rate_is_not_measured_so() -> None:
    assert measured(edges=1)[0] is None
    assert measured(edges=2, profiles=["delay=5ms"])[0] is None


def test_links_of_a_cell_are_left_empty_where_they_would_take_of_what_is_measured(tmp_path: Path) -> None:
    for scheduler, full in (("equal", False), ("reserved", True)):
        path = tmp_path / f"{scheduler}.yaml"
        path.write_text(f"{{kind: cell, nodes: 4, profile: 'rate=40mbit,delay=5ms', scheduler: {scheduler}}}")
        found, _ = measured(topology=str(path), cloud="cloud", edges=3, profiles=["rate=40mbit,delay=5ms"])
        assert (found is not None) == full
    asked = {check.way: check.asked for check in found.calibration.checks if check.what == "rate"}
    assert asked["up"] == pytest.approx(40e6 / 3)
    assert found.asked_bps == pytest.approx(2 * 40e6 / 3 * 1448 / 1500)
