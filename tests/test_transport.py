"""Transports as scenarios write them: swept, in the cell's identity, and refused above the rate that they keep up with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest

from testbed.errors import SpecError
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import make_plan
from testbed.experiment.results import as_now
from testbed.experiment.scenario import Plan
from testbed.transport.tcp import Tcp
from testbed.transport.transport import TRANSPORTS, parse
from tests.test_delivery import plan


@dataclass(frozen=True)
class Snail(Tcp):
    """TCP that says of itself that it is slow."""

    name: ClassVar[str] = "snail"
    keeps_up_bps: ClassVar[float] = 10e6


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSPORTS, "snail", "tests.test_transport:Snail")


def transports(made: Plan) -> list[str]:
    return [str(kind) for kind in made.scenario.transport]


@pytest.mark.parametrize(
    "written, canonical",
    [
        ("tcp", "tcp"),
        ("tcp(connection=fresh)", "tcp"),
        ("tcp( congestion = cubic,connection=reuse )", "tcp(connection=reuse, congestion=cubic)"),
    ],
)
def test_a_text_has_one_canonical_form_that_reads_back(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("pigeon", r"transport 'pigeon': unknown; there is tcp"),
        ("tcp+reuse", "unknown"),
        ("tcp(connection=kept)", "expected one of fresh, reuse"),
        ("tcp(congestion=two.words)", "congestion is two.words, but must be a name such as cubic"),
        ("tcp(rate=5)", "no parameter 'rate'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_remedy(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse(text)
    with pytest.raises(SpecError, match=rf"t\.yaml: transport\[0\]: .*{complaint}"):
        plan(transport=text)


def test_a_scenario_has_cells_of_each_transport_where_something_crosses() -> None:
    both = ["tcp", "tcp(connection=reuse)"]
    made = plan(transport=both)
    cells = made.cells(0, 256)
    split = [(c.codec_text, str(c.transport), c.profile.name) for c in cells if c.placement == "split"]
    assert split == list(itertools.product(("fp16", "int8"), both, ("5g-mid", "lte")))
    cloud = [(str(c.transport), c.profile.name) for c in cells if c.placement == "cloud"]
    assert cloud == list(itertools.product(both, ("5g-mid", "lte")))
    assert [str(c.transport) for c in cells if c.placement == "edge"] == ["tcp", "tcp"]
    assert [line["transport"] for line in Estimator(made).summary()] == [str(c.transport) for c in cells]
    assert len({cell.identity(made) for cell in cells}) == len(cells)
    kept = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")  # what --resume reads
    assert kept.cells(0, 256) == cells
    with pytest.raises(SpecError, match=r"t\.yaml: transport: 'tcp' is listed twice"):
        plan(transport=["tcp", "tcp()"])


def test_a_kept_connections_trials_wait_in_real_time_and_the_others_do_not() -> None:
    made = plan(transport=["tcp", "tcp(connection=reuse)"], placements="cloud")
    assert [made.replays(cell) for cell in made.cells(0, 256)] == [False, False, True, True]


@pytest.mark.parametrize(
    "words, folded",
    [
        ({"connection": "reuse"}, ["tcp(connection=reuse)"]),
        ({"congestion": "bbr"}, ["tcp(congestion=bbr)"]),
        (
            {"congestion": "bbr", "connection": "reuse", "transport": ["tcp", "tcp(congestion=reno)"]},
            ["tcp(connection=reuse, congestion=bbr)", "tcp(connection=reuse, congestion=reno)"],
        ),
        ({"connection": "per-request", "congestion": None}, ["tcp"]),
    ],
)
def test_what_older_scenarios_say_of_connections_is_said_of_each_tcp(
    words: dict[str, object], folded: list[str]
) -> None:
    made = plan(**words)
    assert transports(made) == folded
    again = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert transports(again) == folded


def test_a_congestion_control_that_all_name_is_the_links_too_and_one_of_several_is_not() -> None:
    assert {k.congestion for k in plan(transport="tcp(congestion=bbr)").topology.links} == {"bbr"}
    beside = plan(transport=["tcp(congestion=bbr)", "tcp"])
    assert {k.congestion for k in beside.topology.links} == {k.congestion for k in plan().topology.links}


def test_cells_of_runs_from_before_transports_keep_their_identity() -> None:
    def first(**words: object) -> str:
        made = plan(**words)
        return made.cells(0, 256)[0].identity(made)

    assert first() == first(transport="tcp") == "2853c9a4383b"
    assert first(connection="reuse") == first(transport="tcp(connection=reuse)") == "99a355f67c68"
    assert first(congestion="bbr") == first(transport="tcp(congestion=bbr)") == "f40a186e7937"


def test_older_rows_are_read_as_rows_are_written_now() -> None:
    def read(**row: str) -> str:
        return as_now({"placement": "split", **row})["transport"]

    assert read(transport="tcp+reuse") == "tcp(connection=reuse)"
    assert read(transport="tcp") == "tcp"
    assert read(transport="tcp", placement="edge") == ""
    assert read(transport="tcp(connection=reuse)") == "tcp(connection=reuse)"


@pytest.mark.parametrize(
    "profile, rate",
    [
        ("rate=20mbit", "up to 20mbit"),
        ("delay=5ms", "no rate"),
        ("up:rate=1mbit;down:rate=50mbit", "up to 50mbit"),
        ("delay=5ms,sine:5mbit..30mbit*2s", "up to 30mbit"),
    ],
)
def test_a_link_that_a_transport_does_not_keep_up_with_is_refused_by_name(profile: str, rate: str) -> None:
    with pytest.raises(SpecError, match=rf"t\.yaml: transport: snail keeps up with 10mbit, .*{rate}"):
        plan(transport=["tcp", "snail"], profiles=[profile])
    assert transports(plan(transport=["snail"], profiles=["rate=10mbit"])) == ["snail"]


def test_what_may_lose_parts_is_refused_for_deliveries_that_need_each() -> None:
    with pytest.raises(
        SpecError, match=r"datagram may lose parts, and stream\(by=layers\) needs each of them"
    ):
        plan(transport=["tcp", "datagram"], delivery=["whole", "stream(by=layers)"])
    made = plan(transport="datagram(fec=0.05)", delivery="stream")
    assert transports(made) == ["datagram(fec=0.05)"]
    with pytest.raises(SpecError, match=r"fec is 2, but must be from 0 to 0\.5"):
        plan(transport="datagram(fec=2)")
