"""A load of edges that have models, devices and deliveries of their own, by real processes without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.analysis import loads, summary
from testbed.analysis.run import load
from testbed.experiment import runner
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.row import STAGES
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.test_scenarios import device
from tests.load.unlinked import Unlinked

_PASSED = Calibration("n1-hub", "p", "none", (Attempt((), {}),))


@pytest.mark.slow
def test_each_edge_sends_what_its_own_model_makes_in_its_own_way(tmp_path: Path) -> None:
    star = tmp_path / "star.yaml"
    star.write_text("{kind: star, nodes: 5, profile: 5g-mid}")
    here = device(tmp_path / "here.yaml", "qwen2.5-3b")
    phone = device(tmp_path / "phone.yaml", "qwen2.5-7b")
    scenario: dict[str, Any] = {
        "name": "own",
        "topology": str(star),
        "cloud": "hub",
        "edges": {
            "n1": None,
            "n2": {"model": "shape:qwen2.5-7b", "compute": {"edge": phone, "cloud": phone}},
            "n3": {"delivery": "stream(chunk=32)"},
            "n4": {"delivery": "stream(by=layers, chunk=12)"},
        },
        "profiles": ["rate=50mbit,delay=5ms"],
        "tasks": ["needle"],
        "codecs": ["int4"],
        "context_tokens": [64],
        "examples": 1,
        "max_new_tokens": 3,
        "load": "poisson(rate=12/s)",
        "serving": "batch(max=4)",
        "duration": "1500ms",
        "timeout": "20s",
        "model": "shape:qwen2.5-3b",
        "compute": {"edge": here, "cloud": here},
    }
    with (
        patch("testbed.experiment.load_run.Fabric", Unlinked),
        patch.object(LoadRunner, "_measured", lambda self, profile: _PASSED),
        patch("testbed.experiment.full_load.measured", lambda fabric, plan: None),
    ):
        plan = make_plan(scenario, "t.yaml")
        started = runner.start(plan, tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
        started.execute()
    rows = list(started.directory.rows())
    assert rows and not any(row["error"] for row in rows)
    assert {(row["client"], row["model"], row["edge_device"], row["delivery"]) for row in rows} == {
        ("n1", "shape:qwen2.5-3b", "here", "whole"),
        ("n2", "shape:qwen2.5-7b", "phone", "whole"),
        ("n3", "shape:qwen2.5-3b", "here", "stream(chunk=32)"),
        ("n4", "shape:qwen2.5-3b", "here", "stream(by=layers, chunk=12)"),
    }
    for row in rows:
        assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
    sizes = {row["client"]: row["payload_bytes"] / row["kv_bytes"] for row in rows}
    assert sizes["n2"] == pytest.approx(sizes["n1"], rel=0.1)  # of another cache, whose size is another
    assert len({row["kv_bytes"] for row in rows}) == 2
    inputs = started.directory.manifest()["inputs"]
    assert {name for name in inputs if name.startswith("device profile")} == {
        f"device profile {word.removeprefix('device:')}" for word in (here, phone)
    }
    run = load(tmp_path / "run")
    (each,) = loads.served(run)
    assert each.clients == 4 and "qwen2.5-7b" in each.panel and "stream(chunk=32)" in each.setting
    lines = summary.summarise(run)
    assert sorted(zip(lines["model"], lines["delivery"], strict=True)) == [
        ("shape:qwen2.5-3b", "stream(by=layers, chunk=12)"),
        ("shape:qwen2.5-3b", "stream(chunk=32)"),
        ("shape:qwen2.5-3b", "whole"),
        ("shape:qwen2.5-7b", "whole"),
    ]
    again = runner.resume(tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
    again.execute()
    assert again.settled and list(again.directory.rows()) == rows
