"""Loads of a model that computes here: several requests decoded at once, measured beforehand, and contexts in parts."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from testbed.experiment import runner
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.row import STAGES
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.unlinked import Unlinked
from tests.tiny_models import tiny_model_directory

_PASSED = Calibration("n1-hub", "p", "none", (Attempt((), {}),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.slow
def test_a_load_of_a_real_model_is_served_in_batches_and_in_parts(model: Path, tmp_path: Path) -> None:
    star = tmp_path / "star.yaml"
    star.write_text("{kind: star, nodes: 3, profile: 5g-mid}")
    scenario = {
        "name": "load",
        "topology": str(star),
        "cloud": "hub",
        "edges": ["n1", "n2"],
        "profiles": ["rate=50mbit,delay=5ms"],
        "tasks": ["needle"],
        "placements": ["split"],
        "codecs": ["int8", "q2c@0.5+int8"],
        "delivery": ["whole", "stream(chunk=32)", "stream(by=layers, chunk=1)"],
        "context_tokens": [128],
        "examples": 1,
        "max_new_tokens": 6,
        "load": "poisson(rate=12/s)",
        "serving": "batch(max=3)",
        "duration": "1s",
        "timeout": "20s",
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
    }
    with (
        patch("testbed.experiment.load_run.Fabric", Unlinked),
        patch.object(LoadRunner, "_measured", lambda self, profile: _PASSED),
        patch("testbed.experiment.full_load.measured", lambda fabric, plan: None),
    ):
        started = runner.start(
            make_plan(scenario, "t.yaml"), tmp_path / "run", lambda progress: None, accept_uncalibrated=False
        )
        started.execute()
    rows = list(started.directory.rows())
    assert rows and not any(row["error"] for row in rows)
    assert {(row["placement"], row["codec"], row["delivery"]) for row in rows} == {
        (placement, codec, delivery)
        for placement in scenario["placements"]
        for codec in scenario["codecs"]
        for delivery in scenario["delivery"]
    }
    for row in rows:
        parts = row["delivery"] != "whole"
        assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
        assert (row["chunks"] or 0) >= (2 if parts else 0) and row["nll"] is not None and row["replayed"]
    # A setting's answer is one, however it came.
    assert all(
        len({row["answer"] for row in rows if (row["placement"], row["codec"]) == setting}) == 1
        for setting in {(row["placement"], row["codec"]) for row in rows}
    )
    measured = json.loads((tmp_path / "run" / "batches.json").read_text())["batches"]
    assert len(measured) == 6
    for each in measured:
        assert each["alike"] and list(each["pass_s"]) == ["1", "2", "3"] and min(each["pass_s"].values()) > 0
