"""A thousand requests through sixteen edges: nothing grows, nothing is lost or doubled, and nothing is asked again."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.experiment import runner
from testbed.experiment.crowd import Crowd
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.net.calibration.calibrate import Attempt, Calibration
from tests.load.unlinked import Unlinked

EDGES, RATE, LASTS_S = 16, 36, 28
_PASSED = Calibration("n1-hub", "p", "none", (Attempt((), {}),))


class Watched:
    """What the sides of a crowd have of memory of their own and of open files, as time goes by."""

    def __init__(self) -> None:
        self.memory: list[Counter[str]] = []
        self.files: list[Counter[str]] = []
        self._over = threading.Event()

    def watch(self, crowd: Crowd) -> None:
        ends = {f"edge {n}": edge for n, edge in enumerate(crowd._edges) if edge is not None}
        while not self._over.wait(2.0):
            pids = {name: end.process.pid for name, end in {**ends, "cloud": crowd._cloud}.items()}
            self.memory.append(Counter({name: _own_kb(pid) for name, pid in pids.items()}))
            self.files.append(
                Counter({name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()})
            )

    def stop(self) -> None:
        self._over.set()


def _own_kb(pid: int) -> int:
    """What a process shares with nobody: not the payloads' files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.slow
def test_nothing_grows_and_every_request_has_one_row(tmp_path: Path) -> None:
    fast, star = tmp_path / "fast.yaml", tmp_path / "star.yaml"
    fast.write_text(
        "{device: fast, model: qwen2.5-3b, dtype: float16, basis: measured, source: here, "
        "prefill: [[16, 2ms], [512, 4ms]], decode: [[16, 1ms], [512, 2ms]]}"
    )
    star.write_text(f"{{kind: star, nodes: {EDGES + 1}, profile: 5g-mid}}")
    device = f"device:{fast}"
    scenario: dict[str, Any] = {
        "name": "soak",
        "topology": str(star),
        "cloud": "hub",
        "edges": "n*",
        "profiles": ["rate=50mbit,delay=5ms"],
        "tasks": ["needle"],
        "codecs": ["int4"],
        "context_tokens": [32],
        "examples": 1,
        "max_new_tokens": 2,
        "load": f"poisson(rate={RATE}/s)",
        "duration": f"{LASTS_S}s",
        "timeout": "20s",
        "model": "shape:qwen2.5-3b",
        "compute": {"edge": device, "cloud": device},
    }
    watched, collected = Watched(), Crowd._collected

    def collect(self: Crowd, *about: Any) -> Any:
        watching = threading.Thread(target=watched.watch, args=(self,), daemon=True)
        watching.start()
        try:
            return collected(self, *about)
        finally:
            watched.stop()
            watching.join()

    with (
        patch("testbed.experiment.load_run.Fabric", Unlinked),
        patch.object(LoadRunner, "_measured", lambda self, profile: _PASSED),
        patch("testbed.experiment.full_load.measured", lambda fabric, plan: None),
        patch.object(Crowd, "_collected", collect),
    ):
        plan = make_plan(scenario, "t.yaml")
        started = runner.start(plan, tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
        started.execute()
    found = list(started.directory.rows())
    nodes = [edge.node for edge in plan.edges]
    planned = plan.scenario.load[0].arrivals(nodes, LASTS_S, "0/0/0")  # type: ignore[attr-defined]
    assert len(found) >= 900 and len({row["trial"] for row in found}) == len(found)
    assert Counter(row["client"] for row in found) == Counter(nodes[edge] for _, edge in planned)
    assert not any(row["error"] for row in found)
    # From a third on: each edge has connected, and whatever is held once is held.
    early, late = len(watched.memory) // 3, -1
    assert len(watched.memory) >= 8
    for name, before in watched.memory[early].items():
        assert watched.memory[late][name] <= 1.1 * before + 1024, f"{name}: KB of memory"
        # What is under way at that moment has sockets: a few.
        assert watched.files[late][name] <= watched.files[early][name] + (40 if name == "cloud" else 4), name
    again = runner.resume(tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
    again.execute()
    assert again.settled and list(again.directory.rows()) == found
