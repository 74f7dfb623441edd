"""Trials one after the other across a link: when a connection may be closed without the link's delays, and what comes next."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.experiment.crossing import Crossing
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Cell, Plan
from testbed.experiment.trial import Trial
from testbed.tasks.task import Example

SCENARIO = {
    "name": "two-links",
    "topology": "edge-cloud",
    "profiles": ["lte", "5g-mid"],
    "model": "smollm2-135m",
    "placements": ["split"],
    "codecs": ["int4"],
    "tasks": [{"task": "needle", "examples": 1}],
}


class Both:
    """A network and a pair that note what they are asked for, in turn."""

    def __init__(self, can_hurry: bool = True) -> None:
        self.asked: list[str] = []
        self._can_hurry = can_hurry

    def settle(self, link: str) -> bool:
        self.asked.append("settle")
        return True

    def apply(self, link: str, profile: Any, origin_s: float) -> None:
        self.asked.append(profile.name)

    def hurry(self, link: str) -> bool:
        self.asked.append("hurry")
        return self._can_hurry

    def trial(self, trial: Trial, origin: float, lingers: bool) -> str:
        self.asked.append("trial, and its connection lingers" if lingers else "trial")
        return "result"

    def hang_up(self, result: str) -> str:
        self.asked.append("hang up")
        return f"whole {result}"


def planned(**changes: Any) -> Plan:
    return make_plan({**SCENARIO, **changes}, "here")


def crossed(plan: Plan, both: Both) -> list[Any]:
    """The plan's trials of one example, one after the other."""
    cells: list[Cell] = plan.cells(0, plan.scenario.context_tokens[0])
    trials = [Trial(cell, "", 0, 0, 0, Example("e", "", "", ()), "") for cell in cells]
    crossing = Crossing(plan, SimpleNamespace(network=both, pair=both))  # type: ignore[arg-type]
    crossing.begin()
    results = []
    for trial, following in zip(trials, [*trials[1:], None], strict=True):
        crossing.align(trial)
        results.append(crossing.trial(trial, following))
    return results


def test_where_other_conditions_follow_a_connection_is_closed_at_once_and_nothing_is_waited_for() -> None:
    both = Both()
    assert crossed(planned(), both) == ["whole result", "result"]
    first = ["settle", "lte", "trial, and its connection lingers", "hurry", "hang up"]
    assert both.asked == [*first, "5g-mid", "trial"]


def test_a_link_that_cannot_be_hurried_is_waited_for_as_ever() -> None:
    both = Both(can_hurry=False)
    crossed(planned(), both)
    assert both.asked[-4:] == ["hang up", "settle", "5g-mid", "trial"]


@pytest.mark.parametrize(
    "changes",
    [
        {"transport": ["tcp(connection=reuse)"]},  # which knows the link by its delays
        {"transport": ["quic"]},
        {"profiles": ["lte"], "codecs": ["int4", "int8"]},
    ],
)
def test_no_connection_lingers_that_goes_on_or_whose_conditions_do(changes: dict[str, Any]) -> None:
    both = Both()
    crossed(planned(**changes), both)
    assert both.asked.count("trial") == 2 and "hurry" not in both.asked


def test_where_packets_are_captured_or_other_traffic_goes_on_all_cross_the_link_as_it_is() -> None:
    plan = planned()
    link = plan.topology.link(plan.link)
    looked_at = replace(plan.topology, links=(replace(link, pcap=True),))
    both = Both()
    crossed(replace(plan, topology=looked_at), both)
    assert "hurry" not in both.asked
