"""Runs of loads by real processes without a network: rows, what a killed edge leaves, and resuming."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.analysis.run import load
from testbed.errors import EndpointError
from testbed.experiment import runner, wares
from testbed.experiment.crowd import Crowd
from testbed.experiment.load_run import LoadRunner
from testbed.experiment.plan import make_plan
from testbed.experiment.row import STAGES
from testbed.load.load import Open
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.emulators.emulator import Counters
from tests.load.unlinked import Unlinked

SCENARIO = {
    "name": "load",
    "cloud": "hub",
    "edges": {"n1": None, "n2": {"codec": "int8"}, "n3": None},
    "profiles": ["rate=50mbit,delay=5ms"],
    "tasks": ["needle"],
    "codecs": ["int4"],
    "context_tokens": [64],
    "examples": 2,
    "max_new_tokens": 4,
    "load": "closed(think=100ms)",
    "duration": "2s",
    "warmup": "500ms",
    "timeout": "10s",
    "model": "shape:llama-3.1-8b",
}


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fast ones, so that requests are over soon."""
    path = tmp_path_factory.mktemp("devices") / "fast.yaml"
    path.write_text(
        "{device: fast, model: llama-3.1-8b, dtype: float16, basis: measured, source: here, "
        "prefill: [[16, 20ms], [512, 40ms]], decode: [[16, 5ms], [512, 6ms]]}"
    )
    return {"edge": f"device:{path}", "cloud": f"device:{path}"}


@pytest.fixture(scope="module")
def kept() -> Iterator[Callable[..., Any]]:
    """Makes what is sent once for all tests: it is the same in all of them."""
    real, found = wares.made, list[wares.Wares]()
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def made(plan: Any, directory: Any, *about: Any) -> Iterator[wares.Wares]:
            if not found:
                found.append(stack.enter_context(real(plan, directory, *about)))
            yield found[0]

        yield made


@pytest.fixture(autouse=True)
def unlinked(kept: Callable[..., Any]) -> Iterator[None]:
    passed = Calibration("n1-hub", "p", "none", (Attempt((), {}),))
    with (
        patch("testbed.experiment.load_run.Fabric", Unlinked),
        patch("testbed.experiment.wares.made", kept),
        patch.object(LoadRunner, "_measured", lambda self, profile: passed),
        patch("testbed.experiment.full_load.measured", lambda fabric, plan: None),
    ):
        yield


def begun(folder: Path, devices: dict[str, str], **changes: Any) -> runner.Runner:
    star = folder / "star.yaml"
    star.write_text("{kind: star, nodes: 4, profile: 5g-mid}")
    plan = make_plan({**SCENARIO, "topology": str(star), "compute": devices, **changes}, "t.yaml")
    return runner.start(plan, folder / "run", lambda progress: None, accept_uncalibrated=False)


def rows(started: runner.Runner) -> list[dict[str, Any]]:
    return list(started.directory.rows())


def test_a_load_leaves_a_row_a_request_that_says_who_asked_when_and_where_it_waited(
    tmp_path: Path, devices: dict[str, str]
) -> None:
    started = begun(
        tmp_path, devices, load=["closed(think=100ms)", "poisson(rate=6/s)"], serving="batch(max=4)"
    )
    started.execute()
    found = rows(started)
    assert {row["client"] for row in found} == {"n1", "n2", "n3"} and not any(row["error"] for row in found)
    assert {(row["client"], row["codec"], row["link"]) for row in found} == {
        ("n1", "int4", "n1-hub"),
        ("n2", "int8", "n2-hub"),
        ("n3", "int4", "n3-hub"),
    }
    assert {row["load"] for row in found} == {"closed(think=100ms)", "poisson(rate=6/s)"}
    assert len({row["trial"] for row in found}) == len(found) >= 10
    for row in found:
        assert row["replayed"] and row["serving"] == "batch(max=4)" and row["model"] == "shape:llama-3.1-8b"
        assert row["warmup"] == (row["arrived_at"] < 0.5) and row["arrived_at"] < 2.5
        assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
        assert row["payload_bytes"] > 100_000 and row["wire_bytes"] > row["payload_bytes"]
    counted = load(tmp_path / "run")
    assert len(counted.rows) == sum(not row["warmup"] for row in found) < len(found)
    again = runner.resume(tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
    again.execute()
    assert again.settled and rows(again) == found


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Does that, in a thread, once the condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("load", "killed"), [("poisson(rate=8/s)", 1), ("closed(think=100ms)", 0)])
def test_an_edge_that_is_killed_takes_its_own_requests_with_it_and_nobody_elses(
    tmp_path: Path, devices: dict[str, str], load: str, killed: int
) -> None:
    started = begun(tmp_path, devices, load=load, duration="3s")
    crowds: list[Crowd] = []
    entered, asked = Crowd.__enter__, threading.Event()

    def enter(self: Crowd) -> Crowd:
        crowds.append(self)
        return entered(self)

    collected = Crowd._collected

    def collect(self: Crowd, *about: Any) -> Any:
        asked.set()
        return collected(self, *about)

    def kill() -> None:
        time.sleep(1.2)
        edge = crowds[0]._edges[killed]
        assert edge is not None
        os.kill(edge.process.pid, signal.SIGKILL)

    with patch.object(Crowd, "__enter__", enter), patch.object(Crowd, "_collected", collect):
        killing = when(asked.is_set, kill)
        started.execute()
    killing.join()
    found = rows(started)
    failed = [row for row in found if row["error"]]
    victim = f"n{killed + 1}"
    assert failed and {row["client"] for row in failed} == {victim}
    assert all("signal SIGKILL" in row["error"] and row["e2e_s"] is None for row in failed)
    others = [row for row in found if row["client"] != victim]
    died = max(row["arrived_at"] for row in found if row["client"] == victim and not row["error"])
    assert {row["client"] for row in others if row["arrived_at"] > died} == {"n1", "n2", "n3"} - {victim}
    for row in others:
        assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], abs=1e-5)
    offered = started.plan.scenario.load[0]
    if isinstance(offered, Open):
        planned = offered.arrivals(["n1", "n2", "n3"], 3.5, "0/0/0")
        assert Counter(row["client"] for row in found) == Counter(f"n{edge + 1}" for _, edge in planned)
    else:
        assert len(failed) == 1  # the one request that its client had under way


def test_a_load_that_did_not_come_to_its_end_leaves_nothing_and_is_put_on_again(
    tmp_path: Path, devices: dict[str, str]
) -> None:
    started = begun(tmp_path, devices, load=["poisson(rate=6/s)", "poisson(rate=7/s)"], duration="1s")
    ask, loads = Crowd.ask, []

    def second_fails(self: Crowd, *about: Any) -> Any:
        loads.append(about)
        if len(loads) == 2:
            raise EndpointError("the cloud is gone")
        return ask(self, *about)

    with patch.object(Crowd, "ask", second_fails), pytest.raises(EndpointError, match="the cloud is gone"):
        started.execute()
    first = rows(started)
    assert {row["load"] for row in first} == {"poisson(rate=6/s)"}
    # As a kill would leave it that comes between a load's rows and the note that it has ended.
    with (tmp_path / "run" / "trials.jsonl").open("a") as lines:
        lines.write(json.dumps({**first[0], "trial": "0", "load": "poisson(rate=7/s)"}) + "\n")
    again = runner.resume(tmp_path / "run", lambda progress: None, accept_uncalibrated=False)
    again.execute()
    found = rows(again)
    assert found[: len(first)] == first
    assert {row["load"] for row in found[len(first) :]} == {"poisson(rate=7/s)"}
    assert len({row["trial"] for row in found}) == len(found)


def test_who_is_refused_has_a_row_with_the_reason_and_is_no_failure(
    tmp_path: Path, devices: dict[str, str]
) -> None:
    started = begun(
        tmp_path,
        devices,
        load="poisson(rate=60/s)",
        serving="fifo(waiting=1)",
        duration="1s",
    )
    started.execute()
    refused = [row for row in rows(started) if row["refused"]]
    assert refused and started.failures == 0
    assert all("refused: 1 requests wait already" in row["error"] and row["e2e_s"] is None for row in refused)


def test_a_late_packet_is_told_of_the_client_behind_whose_link_it_was(
    tmp_path: Path, devices: dict[str, str]
) -> None:
    late = {"n1-hub": 0.001, "n2-hub": 0.007, "n3-hub": 0.0}

    def counters(self: Unlinked, link: str) -> dict[str, Counters]:
        return {"up": Counters(9, 900, 0, 0, 0.5, recent_lateness_s=late[link])}

    started = begun(tmp_path, devices, load="poisson(rate=12/s)", duration="1s", warmup="0s")
    with patch.object(Unlinked, "counters", counters):
        started.execute()
    (ended,) = json.loads((tmp_path / "run" / "loads.json").read_text())["ended"]
    assert ended["late_s"] == {"n1": 0.001, "n2": 0.007, "n3": 0.0}
    found = rows(started)
    assert {row["client"] for row in found} == {"n1", "n2", "n3"}
    warned = {row["client"] for row in found if "the emulator was late by up to 7ms" in row["warnings"]}
    assert warned == {"n2"} and all(bool(row["warnings"]) == (row["client"] == "n2") for row in found)
