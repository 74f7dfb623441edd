"""A run goes on only with the task files and the model that it began with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from testbed.errors import UsageError
from testbed.experiment import inputs
from testbed.experiment.plan import make_plan
from testbed.experiment.results import RunDirectory, write_json
from testbed.experiment.runner import resume
from testbed.net.profile import lookup

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


def test_a_run_does_not_go_on_with_other_questions(began: Path) -> None:
    (began.parent / "rows.jsonl").write_text(json.dumps({**ROW, "answers": ["Rome"]}) + "\n")
    with pytest.raises(UsageError, match=r"task file .*rows.jsonl: has changed since this run began"):
        taken_up(began)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_run_does_not_go_on_with_another_model_of_the_same_size(began: Path, name: str) -> None:
    path = began.parent / "model" / name
    size = path.stat().st_size
    path.write_bytes(b"\x20" * size if name == "model.safetensors" else b"[]")
    assert path.stat().st_size == size
    with pytest.raises(UsageError, match=r"model .*model: has changed since this run began"):
        taken_up(began)


def test_a_run_from_before_its_inputs_were_kept_goes_on(began: Path) -> None:
    manifest = RunDirectory.open(began).manifest()
    del manifest["inputs"]
    write_json(began / "manifest.json", manifest)
    (began.parent / "rows.jsonl").write_text(json.dumps({**ROW, "answers": ["Rome"]}) + "\n")
    assert taken_up(began)


@pytest.mark.parametrize(
    ("name", "what"),
    [("own-topology.yaml", "topology"), ("table.dist", "jitter table"), ("rows.jsonl", "task file")],
)
def test_a_run_does_not_go_on_with_another_file(began: Path, name: str, what: str) -> None:
    path = began.parent / name
    path.write_text(path.read_text() + ("" if name == "rows.jsonl" else "# another\n") + "\n")
    with pytest.raises(UsageError, match=rf"{what} .*{name}: has changed since this run began"):
        taken_up(began)
