"""A cell that is shared out anew for each load, on a network: what edges announced, and what flowed beside them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from testbed.experiment import runner
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.test_scenarios import BASE

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.usefixtures("own_state")]


def test_each_load_meets_the_cell_as_it_is_to_be_shared_out_and_the_traffic_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "cell.yaml"
    path.write_text("{kind: cell, nodes: 3, profile: 5g-mid}")
    asked = {
        "topology": str(path),
        "cloud": "cloud",
        "edges": {"edge1": {"codec": "fp16"}, "edge2": {"codec": "int4"}},
        "profiles": "rate=30mbit,delay=5ms",
        "allocate": ["reserved", "model-aware"],
        "load": "rounds(every=2s)",
        "duration": "3s",
        "placements": "store",
        "context_tokens": 16,
        "examples": 1,
        "max_new_tokens": 2,
        "traffic": {"from": "edge2", "to": "cloud", "kind": "udp", "rate": "1mbit"},
    }
    plan = make_plan({**BASE, **asked}, "t.yaml")
    started = runner.start(plan, tmp_path / "run", lambda progress: None, accept_uncalibrated=True)
    passed = Calibration("radio-1", "p", "none", (Attempt((), {}),))
    with patch.object(LoadRunner, "_measured", lambda self, profile: passed):
        started.execute()
    rows = list(started.directory.rows())
    told = json.loads((tmp_path / "run" / "loads.json").read_text())
    sizes = {row["client"]: row["payload_bytes"] for row in rows}
    shares = [each["allocate"]["cell"] for each in told["ended"]]
    assert shares == ["reserved", f"model-aware(bytes=[{sizes['edge1']}b, {sizes['edge2']}b])"]
    assert [row["allocate"] for row in rows] == ["reserved"] * 4 + ["model-aware"] * 4
    assert not any(row["error"] for row in rows) and sizes["edge1"] > 3 * sizes["edge2"]
    assert all(each["traffic"][0]["received_bytes"] > 100_000 for each in told["ended"])
    assert len(told["full"]) == 2  # by each way of sharing out, whose parts are fixed
