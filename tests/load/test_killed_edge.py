"""An edge that is killed in the middle of a load over emulated links."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.experiment import runner
from testbed.experiment.crowd import Crowd
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.row import STAGES
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.test_scenarios import BASE

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.usefixtures("own_state")]


def test_the_others_requests_go_on_over_their_links_as_if_nothing_had_been(tmp_path: Path) -> None:
    path = tmp_path / "star.yaml"
    path.write_text("{kind: star, nodes: 4, profile: 5g-mid}")
    asked = {
        "topology": str(path),
        "cloud": "hub",
        "edges": 3,
        "profiles": "rate=30mbit,delay=5ms",
        "load": ["closed(think=100ms)", "closed(think=200ms)"],
        "duration": "4s",
        "placements": "store",
        "context_tokens": 16,
        "examples": 1,
        "max_new_tokens": 2,
    }
    plan = make_plan({**BASE, **asked}, "t.yaml")
    started = runner.start(plan, tmp_path / "run", lambda progress: None, accept_uncalibrated=True)
    passed = Calibration("n1-hub", "p", "none", (Attempt((), {}),))
    collected, crowds, killed = Crowd._collected, list[Crowd](), list[float]()

    def kill() -> None:
        time.sleep(1.5)
        edge = crowds[0]._edges[1]
        assert edge is not None
        os.kill(edge.process.pid, signal.SIGKILL)
        killed.append(edge.process.pid)

    killing = threading.Thread(target=kill, daemon=True)

    def collect(self: Crowd, *about: Any) -> Any:
        if not crowds:
            crowds.append(self)
            killing.start()
        return collected(self, *about)

    with (
        patch.object(Crowd, "_collected", collect),
        patch.object(LoadRunner, "_measured", lambda self, profile: passed),
    ):
        started.execute()
    killing.join()
    first, second = (
        [row for row in started.directory.rows() if row["load"] == load] for load in asked["load"]
    )
    died = [row for row in first if row["error"]]
    assert killed and {row["client"] for row in died} == {"n2"}
    assert all("signal SIGKILL" in row["error"] and row["e2e_s"] is None for row in died)
    others = [row for row in first if row["client"] != "n2"]
    after = [row for row in others if row["arrived_at"] > max(row["arrived_at"] for row in died)]
    assert {row["client"] for row in after} == {"n1", "n3"} and len(after) > 4
    for row in others:
        assert row["payload_bytes"] and sum(row[stage] for stage in STAGES) == pytest.approx(
            row["e2e_s"], abs=1e-5
        )
    # It is started again for the next load.
    assert {row["client"] for row in second} == {"n1", "n2", "n3"} and not any(row["error"] for row in second)
