"""What a run reads by name: where it is found, what is kept of it, and that a run goes on with the same alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from testbed import lookup
from testbed.codecs.diagnosed import FORMAT
from testbed.codecs.entropy import tables
from testbed.errors import UsageError
from testbed.experiment import inputs
from testbed.experiment.plan import load_plan, make_plan
from testbed.experiment.results import RunDirectory, write_json
from testbed.experiment.runner import begin, resume
from testbed.experiment.scenario import Plan
from testbed.net.profile.trace import File
from testbed.net.topology.files import load_topology

ROW = {"context": "The mill stands in Oslo.", "question": "Where is it?", "answers": ["Oslo"]}


@pytest.fixture
def began(tmp_path: Path) -> Path:
    """A run's directory, as it is when the run begins."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(8 << 20))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "table.dist").write_text("-8192 0 8192\n")
    shutil.copy(Path(__file__).parents[1] / "topologies" / "edge-cloud.yaml", tmp_path / "own-topology.yaml")
    task = {"task": "qa", "path": "rows.jsonl"}
    profile = f"delay=20ms,jitter=table(1ms,file={tmp_path / 'table.dist'})"
    settings = {
        "name": "own",
        "topology": "own-topology.yaml",
        "profiles": profile,
        "model": str(model),
        "tasks": task,
    }
    with lookup.beside(tmp_path / "own.yaml"):
        plan = make_plan(settings, "own.yaml")
    run = RunDirectory.create(tmp_path / "run")
    settings = plan.scenario.model_dump(mode="json")
    run.write("manifest.json", {"format": 3, "settings": settings, "inputs": inputs.described(plan)})
    return run.path


def taken_up(run: Path) -> object:
    return resume(run, None, False)  # type: ignore[arg-type]


def test_a_run_goes_on_with_the_files_that_it_began_with(began: Path) -> None:
    os.utime(began.parent / "rows.jsonl", (0, 0))
    os.utime(began.parent / "model" / "model.safetensors", (0, 0))
    assert taken_up(began)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("rows.jsonl", lambda data: data.replace(b"Oslo", b"Rome"), "task file"),
        ("model/config.json", lambda data: b"[]", "model"),
        ("model/model.safetensors", lambda data: b"\x20" * len(data), "model"),  # of the same size
        ("own-topology.yaml", lambda data: data + b"# another\n", "topology"),
        ("table.dist", lambda data: data + b"\n", "jitter table"),
    ],
)
def test_a_run_does_not_go_on_with_another_file(
    began: Path, name: str, change: Callable[[bytes], bytes], what: str
) -> None:
    path = began.parent / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match=rf"{what} .*{name.split('/')[0]}: has changed since this run began"):
        taken_up(began)


def test_a_run_from_before_its_inputs_were_kept_goes_on(began: Path) -> None:
    manifest = RunDirectory.open(began).manifest()
    del manifest["inputs"]
    write_json(began / "manifest.json", manifest)
    (began.parent / "rows.jsonl").write_text(json.dumps({**ROW, "answers": ["Rome"]}) + "\n")
    assert taken_up(began)


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
    with lookup.among(inputs.kept_traces(entry, directory.path)):
        return make_plan(plan.scenario.model_dump(mode="json"), "manifest.json")


def test_a_run_keeps_its_traces_and_follows_them_when_the_files_are_gone(
    scenario: Path, tmp_path: Path
) -> None:
    plan, directory = load_plan(str(scenario)), RunDirectory.create(tmp_path / "run")
    text = (scenario.parent / "walk.csv").read_bytes()
    entry = inputs.keep_traces(plan, directory)
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
    entry = inputs.keep_traces(plan, directory)
    for wrong in ({"walk.csv": 3}, {"walk.csv": {}}, {"walk.csv": {"file": 3, "sha256": ""}}):
        with pytest.raises(UsageError, match=r"manifest.json: traces: not what a run writes"):
            inputs.kept_traces(wrong, directory.path)
    (directory.path / entry["walk.csv"]["file"]).write_text("0\n1\n")
    with pytest.raises(UsageError, match="is not the trace any more that the run began with"):
        resumed(plan, directory, entry)


def test_a_run_without_traces_keeps_none(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    assert inputs.keep_traces(load_plan("quick"), directory) == {}
    assert list(directory.path.iterdir()) == []
    assert inputs.kept_traces(None, directory.path) == {}


def model_in(folder: Path) -> None:
    """What looks like a model's directory."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def test_a_jitter_table_is_found_kept_and_followed_as_a_trace_is(scenario: Path, tmp_path: Path) -> None:
    table, written = scenario.with_name("own.dist"), "delay=20ms,jitter=table(1ms,file=own.dist)"
    table.write_text("-8192 0 8192\n")
    model_in(scenario.parent / "tiny")
    scenario.write_text(
        f"profiles: ['{written}', '{written},trace:walk.csv']\ntasks: [needle]\nmodel: tiny\n"
    )
    plan, directory = load_plan(str(scenario)), RunDirectory.create(tmp_path / "run")
    assert plan.profiles[0].text() == written
    entry = inputs.keep_traces(plan, directory)
    assert set(entry) == {"own.dist", "walk.csv"}
    before = inputs.described(plan)
    assert list(before) == ["jitter table own.dist", f"model {scenario.parent / 'tiny'}"]
    table.unlink()
    again = resumed(plan, directory, entry)
    assert [p.text() for p in again.profiles] == [p.text() for p in plan.profiles]
    assert again.profiles[0] == plan.profiles[0]
    assert inputs.described(again) == before
    table.write_text("0\n")
    Path("own.dist").write_text("1\n")  # in the working directory
    assert load_plan(str(scenario)).profiles[0].up.jitter_law.entries == (0,)  # type: ignore[union-attr]


def test_a_model_and_what_codecs_name_are_found_beside_the_scenario(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    own = scenario.parent
    for name in ("tiny", "smollm2-135m"):  # of which one is a name of ours
        model_in(own / name)
    (own / "found.json").write_text(json.dumps({"format": FORMAT, "model": "tiny", "protect": "K1"}))
    counted = tables.Counted(1, 1, 1, bytes([255, 9]))
    (own / "own.tables").write_bytes(msgspec.msgpack.encode(tables.Tables(tables.FORMAT, "", [counted])))
    scenario.write_text(
        "profiles: [lte]\ntasks: [needle]\nmodel: tiny\n"
        "codecs: ['mixed(protect=found.json)', 'int4+ans(table=own.tables)']\n"
    )
    made = load_plan(str(scenario)).scenario
    assert made.model == str(own / "tiny")
    codecs = [str(codec) for codec in made.codecs]
    assert codecs[0] == "mixed(protect=K1)" and tables.KEPT.size(codecs[1][-33:-1]) > 0
    assert (
        make_plan(made.model_dump(mode="json"), "manifest.json").scenario == made
    )  # from wherever it goes on
    named = load_plan(str(scenario), assignments=["model=smollm2-135m", "codecs=fp16"]).scenario
    assert named.model == "smollm2-135m"


def test_what_the_hub_gave_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kept = {"model org/model": "models--org--model", "task hub:squad": "datasets--rajpurkar--squad"}
    for folder in kept.values():
        for commit in ("c0ffee", "decade"):
            (tmp_path / folder / "snapshots" / commit).mkdir(parents=True)
            (tmp_path / folder / "snapshots" / commit / "config.json").write_text("{}")
        (tmp_path / folder / "refs").mkdir()
        (tmp_path / folder / "refs" / "main").write_text("decade")
    settings = {
        "name": "hub",
        "profiles": "lte",
        "model": "org/model",
        "tasks": {"task": "qa", "path": "hub:squad"},
    }
    plan = make_plan(settings, "hub.yaml")
    before = inputs.described(plan)
    assert before == dict.fromkeys(kept, "decade")
    inputs.check_unchanged(before, plan)
    for name, folder in kept.items():
        (tmp_path / folder / "refs" / "main").write_text("c0ffee")
        with pytest.raises(UsageError, match=f"{name}: has changed since this run began"):
            inputs.check_unchanged(before, plan)
        (tmp_path / folder / "refs" / "main").write_text("decade")
    shutil.rmtree(tmp_path / "models--org--model" / "snapshots" / "c0ffee")
    shutil.rmtree(tmp_path / "models--org--model" / "refs")  # as a download of one commit leaves it
    assert inputs.described(plan) == before
    shutil.rmtree(tmp_path / "datasets--rajpurkar--squad")
    assert "task hub:squad" not in inputs.described(plan)


@pytest.mark.parametrize("instant", ["while it begins", "when it has begun"])
def test_of_two_runs_that_begin_in_one_directory_at_once_one_is_refused(
    instant: str, scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(str(scenario))
    if instant == "while it begins":
        keep = inputs.keep_traces

        def during(asked: Plan, run: RunDirectory) -> dict[str, Any]:
            with pytest.raises(UsageError, match="another testbed process is working on this run"):
                begin(plan, tmp_path / "run")
            return keep(asked, run)

        monkeypatch.setattr(inputs, "keep_traces", during)
        assert begin(plan, tmp_path / "run").manifest()["name"] == plan.scenario.name
        return

    def between(path: Path) -> RunDirectory:  # the other one begins where this one has seen nothing yet
        write_json(path / "manifest.json", {"name": "other"})
        return RunDirectory(path)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(RunDirectory, "create", between)
    with pytest.raises(UsageError, match="exists and is not empty"):
        begin(plan, tmp_path / "run")
    assert RunDirectory(tmp_path / "run").manifest()["name"] == "other"
