"""What a run keeps of whence its rows are."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import testbed
from testbed.experiment import provenance
from testbed.experiment.plan import make_plan
from tests.command import command
from tests.runs import SCENARIO, rows, run


def _git(where: Path, *arguments: str) -> str:
    said = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=where, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return said.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a checkout of its own, and it is the testbed."""
    package = tmp_path / "checkout" / "testbed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / ".gitignore").write_text("installed\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        _git(package.parent, *arguments)
    monkeypatch.setattr(testbed, "__file__", str(package / "__init__.py"))
    return package


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    clean = provenance.code()
    assert clean["commit"] == _git(checkout, "rev-parse", "HEAD") and clean["dirty"] is False
    (checkout.parent / "notes.txt").write_text("of no account")
    assert provenance.code() == clean
    (checkout / "new.py").write_text("x = 1\n")
    changed = provenance.code()
    assert changed["dirty"] is True and changed["source"] != clean["source"]


def test_an_installed_copy_within_somebodys_checkout_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout.parent / "installed" / "testbed"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(testbed, "__file__", str(installed / "__init__.py"))
    assert provenance.code().keys() == {"version", "source"}
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(testbed, "__file__", str(checkout / "__init__.py"))
    assert provenance.code().keys() == {"version", "source"}


def test_every_file_of_a_model_is_hashed_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    held = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 9000}
    for name, data in held.items():
        (model / name).write_bytes(data)
    (model / "source.json").write_text("when it was converted")
    plan = make_plan({"name": "own", "profiles": "lte", "model": str(model), "tasks": "needle"}, "own.yaml")
    expected = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in held.items()}
    assert provenance.weights(plan) == {str(model): expected}


def test_the_machines_state_is_what_the_kernel_says() -> None:
    found = provenance.machine()
    assert len(found["load"]) == 3 and all(value >= 0 for value in found["load"])
    read = Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()
    assert found["sysctls"]["net.ipv4.tcp_rmem"].split() == read
    assert found["governors"] is None or all(found["governors"])


def test_a_run_keeps_its_questions_and_passes_its_check(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    scenario = tmp_path / "tiny.yaml"
    scenario.write_text(SCENARIO + f"model: {tiny_model('llama')}\n")
    out = tmp_path / "out"
    done = run(str(scenario), "--placement-free", "--out", str(out), codecs=["int8", "q2c@0.25+int4"])
    assert done.status == 0, done.errors
    asked = [json.loads(line) for line in (out / provenance.QUESTIONS).read_text().splitlines()]
    assert {(each["task"], each["example"]) for each in asked} == {
        (r["task"], r["example"]) for r in rows(out)
    }
    assert all(each["answers"] and each["gold"].strip() == each["answers"][0] for each in asked)
    kept = json.loads((out / "manifest.json").read_text())["provenance"]
    assert len(kept["starts"]) == 1 and kept["starts"][0]["code"]["version"] == testbed.__version__
    files = next(iter(kept["weights"].values()))
    assert "config.json" in files and all(len(each["sha256"]) == 64 for each in files.values())
    checked = command("check", str(out))
    assert checked.status == 0 and "scores" in checked.out, checked.out
