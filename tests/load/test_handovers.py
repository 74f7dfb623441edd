"""Edges that go over to another link while a load is on: what a scenario may say of it, and what becomes of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.errors import SpecError
from testbed.experiment import runner
from testbed.experiment.handovers import Met
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.test_scenarios import BASE

OVER = {"edge": "edge", "at": "5s", "from": "radio-a", "to": "radio-b", "outage": "200ms"}


def plan(*handovers: dict[str, Any], **changes: Any) -> Plan:
    asked = {"topology": "towers", "cloud": "cloud", "edges": ["edge"], "handovers": list(handovers)}
    settings = {**BASE, **asked, **changes}
    return make_plan({key: value for key, value in settings.items() if value is not None}, "t.yaml")


def test_an_edge_goes_over_and_back_and_a_manifest_says_so_again() -> None:
    back = {"edge": "edge", "at": "9s", "to": "radio-a", "address": "new"}
    made = plan(OVER, back)
    told = [(h.at_s, h.left, h.to, h.outage_s, h.keep_address) for h in made.handovers]
    assert told == [(5, "radio-a", "radio-b", 0.2, True), (9, "radio-b", "radio-a", 0, False)]
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert again.handovers == made.handovers
    identities = {p.cells(0, 256)[0].identity(p) for p in (made, again, plan(OVER), plan())}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"edge": "tower-a"}, r"t.yaml: handovers\[0\].edge: 'tower-a' is none of edge"),
        (
            {"from": "radio-b", "to": "radio-a"},
            r"handovers\[0\].from: edge is on radio-a then, and not on 'radio-b'",
        ),
        ({"to": "radio-a"}, r"handovers\[0\].to: edge is on radio-a already"),
        ({"to": "radio-c"}, r"handovers\[0\]: topology .* has no link 'radio-c'; did you mean"),
        ({"to": "fibre-a"}, r"handovers\[0\]: edge is not on link fibre-a; it has radio-a, radio-b"),
        ({"at": "60s"}, r"handovers\[0\].at: it is not over by the load's end, 60s behind its start"),
        ({"at": "59s", "outage": "10s"}, r"handovers\[0\].at: it is not over by the load's end, 60s"),
        ({"at": "-1s"}, r"handovers\[0\]: at: "),
        ({"at": 5}, r"handovers\[0\]: at: .*unit"),
        ({"outage": "1h"}, r"handovers\[0\]: outage: "),
        ({"address": "other"}, r"handovers\[0\]: address: "),
        ({"link": "radio-b"}, r"handovers\[0\].*unknown key 'link'"),
    ],
)
def test_a_handover_that_cannot_be_is_refused_by_name(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        plan(OVER | change)


def test_handovers_come_one_behind_the_other_and_under_a_load_alone() -> None:
    with pytest.raises(
        SpecError, match=r"handovers\[1\].at: 5.1s is before edge's handover before it is over"
    ):
        plan(OVER, {"edge": "edge", "at": "5.1s", "to": "radio-a"})
    with pytest.raises(SpecError, match=r"t.yaml: handovers: is of a load"):
        plan(OVER, load=None, edges=None, link="radio-a")
    with pytest.raises(SpecError, match=r"handovers\[0\]: n1 has no other link than n1-hub to go over from"):
        make_plan({**BASE, "handovers": {"edge": "n1", "at": "1s", "to": "n2-hub"}}, "t.yaml")


@pytest.mark.parametrize("value", ["radio-b", 3, {}, [[]], [{"edge": "edge"}], {"left": "radio-a"}])
def test_what_is_no_handover_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(SpecError, match=r"t.yaml: handovers\[0\]") as refused:
        plan(handovers=value)
    assert "\n" not in str(refused.value) and "Written" not in str(refused.value)


def test_a_link_that_ends_at_the_cloud_itself_cannot_be_left(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "{nodes: [edge, tower, cloud], links: [{name: direct, a: edge, b: cloud, profile: lte}, "
        "{name: radio, a: edge, b: tower, profile: lte}, {name: fibre, a: tower, b: cloud, profile: lte}]}"
    )
    with pytest.raises(SpecError, match=r"handovers\[0\]: link direct ends at cloud itself"):
        plan({"edge": "edge", "at": "1s", "to": "radio"}, topology=str(path))


def test_requests_that_were_there_while_their_edge_was_on_no_link_met_the_handover() -> None:
    met = Met("edge", "a > b", 5.0, 5.3)
    assert met.by("edge", 4.0, 5.1) and met.by("edge", 5.1, 5.2) and met.by("edge", 5.2, 9.0)
    assert not met.by("edge", 4.0, 4.9) and not met.by("edge", 5.3, 6.0) and not met.by("other", 4.0, 9.0)


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.usefixtures("own_state")
def test_tcp_breaks_with_the_address_and_quic_goes_on_from_the_next(tmp_path: Path) -> None:
    came = tmp_path / "came.txt"
    came.write_text("0\n3\n9.2\n")  # each is under way for a second
    over = {"edge": "edge", "at": "3.5s", "to": "radio-b", "outage": "100ms", "address": "new"}
    asked = {"load": f"arrivals:{came}", "duration": "9.5s", "timeout": "6s", "context_tokens": 64}
    asked |= {"examples": 1, "max_new_tokens": 2, "placements": "store", "emulator": "userspace"}
    made = plan(over, transport=["tcp", "quic"], profiles=["rate=20mbit,delay=5ms"], **asked)
    started = runner.start(made, tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
    passed = Calibration("radio-a", "p", "none", (Attempt((), {}),))
    with patch.object(LoadRunner, "_measured", lambda self, profile: passed):
        started.execute()
    rows = sorted(started.directory.rows(), key=lambda row: (row["transport"], row["arrived_at"]))
    met = "radio-a > radio-b"
    told = [(row["transport"], row["handover"], bool(row["error"])) for row in rows]
    assert told == [
        ("quic", "", False),
        ("quic", met, False),
        ("quic", "", False),
        ("tcp", "", False),
        ("tcp", met, True),
        ("tcp", "", False),
    ]
