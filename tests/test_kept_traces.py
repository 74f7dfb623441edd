"""Where the traces of a scenario are found, and what a run keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed.errors import UsageError
from testbed.experiment import kept_traces
from testbed.experiment.plan import load_plan, make_plan
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Plan
from testbed.net.profile import lookup
from testbed.net.profile.trace import File
from testbed.net.topology.files import load_topology

SCENARIO = """\
name: traced
profiles: ["delay=5ms,trace:walk.csv", "rate=1mbit", "up:trace:walk.csv(scale=2);down:rate=1mbit"]
tasks: [needle]
"""


def walk(folder: Path, mbps: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "walk.csv"
    path.write_text(f"time_s,rate_mbps\n0,{mbps}\n1,{mbps}\n")
    return path


def found(plan: Plan) -> Path:
    trace = plan.profiles[0].up.trace
    assert trace is not None and isinstance(trace.source, File)
    return trace.source.found()


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario beside its trace, seen from another folder."""
    walk(tmp_path / "own", 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "own" / "traced.yaml"
    path.write_text(SCENARIO)
    return path


def test_a_trace_beside_the_scenario_comes_before_one_in_the_working_directory(scenario: Path) -> None:
    walk(Path(), 9)
    assert found(load_plan(str(scenario))) == scenario.parent / "walk.csv"
    (scenario.parent / "walk.csv").unlink()
    assert found(load_plan(str(scenario))).absolute() == Path("walk.csv").absolute()
    Path("walk.csv").unlink()
    with pytest.raises(UsageError, match=r"traced.yaml: profiles\[0\].*trace walk.csv: no such file"):
        load_plan(str(scenario))


def test_a_topologys_trace_is_found_beside_it_from_anywhere(scenario: Path) -> None:
    path = scenario.with_name("net.yaml")
    path.write_text("nodes: [a, b]\nlinks: [{a: a, b: b, profile: 'trace:walk.csv'}]\n")
    profile = load_topology(path).links[0].profile
    assert profile.up.trace is not None and isinstance(profile.up.trace.source, File)
    assert profile.up.trace.source.found() == scenario.parent / "walk.csv"
    assert profile.text() == "trace:walk.csv"
    assert profile.steady().up.rate_bps == 3e6


def test_where_a_trace_lies_is_no_part_of_a_cells_identity(scenario: Path, tmp_path: Path) -> None:
    other = walk(tmp_path / "other", 3).with_name("traced.yaml")
    other.write_text(SCENARIO)
    one, two = load_plan(str(scenario)), load_plan(str(other))
    assert [c.identity(one) for c in one.cells(0, 256)] == [c.identity(two) for c in two.cells(0, 256)]


def resumed(plan: Plan, directory: RunDirectory, entry: Any) -> Plan:
    with lookup.among(kept_traces.copies(entry, directory.path)):
        return make_plan(plan.scenario.model_dump(mode="json"), "manifest.json")


def test_a_run_keeps_its_traces_and_follows_them_when_the_files_are_gone(
    scenario: Path, tmp_path: Path
) -> None:
    plan, directory = load_plan(str(scenario)), RunDirectory.create(tmp_path / "run")
    text = (scenario.parent / "walk.csv").read_bytes()
    entry = kept_traces.keep(plan, directory)
    assert list(entry) == ["walk.csv"] and entry["walk.csv"]["bytes"] == len(text)
    assert (directory.path / entry["walk.csv"]["file"]).read_bytes() == text
    walk(scenario.parent, 50)
    again = resumed(plan, directory, entry)
    assert found(again).read_bytes() == text
    assert again.profiles[0].steady().up.rate_bps == 3e6
    (scenario.parent / "walk.csv").unlink()
    assert again.profiles[2].steady().up.rate_bps == 6e6
    assert [p.text() for p in again.profiles] == [p.text() for p in plan.profiles]


def test_a_copy_that_changed_or_a_manifest_that_is_none_is_refused(scenario: Path, tmp_path: Path) -> None:
    plan, directory = load_plan(str(scenario)), RunDirectory.create(tmp_path / "run")
    entry = kept_traces.keep(plan, directory)
    for wrong in ({"walk.csv": 3}, {"walk.csv": {}}, {"walk.csv": {"file": 3, "sha256": ""}}):
        with pytest.raises(UsageError, match=r"manifest.json: traces: not what a run writes"):
            kept_traces.copies(wrong, directory.path)
    (directory.path / entry["walk.csv"]["file"]).write_text("0\n1\n")
    with pytest.raises(UsageError, match="is not the trace any more that the run began with"):
        resumed(plan, directory, entry)


def test_a_run_without_traces_keeps_none(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    assert kept_traces.keep(load_plan("quick"), directory) == {}
    assert list(directory.path.iterdir()) == []
    assert kept_traces.copies(None, directory.path) == {}
