"""Ctrl-C and SIGTERM amid runs of every placement, delivery and transport: one line, whole rows, nothing left, and it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kill_resume import INTERRUPTS, PIPELINE, VICTIMS, good, torture

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.usefixtures("own_state")]

KINDS = [kind for kind in PIPELINE if kind != "tcp"]  #: whose deliveries are in "quic", by TCP, too


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_interrupted_says_so_leaves_nothing_and_is_completed_when_resumed(
    tiny_model: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    scenario = PIPELINE[kind].replace("examples: 3", "examples: 1").replace("examples: 5", "examples: 1")
    found = torture(2, 0, tmp_path, tiny_model("llama"), scenario, VICTIMS[:1], INTERRUPTS, measured=False)
    assert good(found), found
    assert not found["ended_before_the_kill"] and found["exit_statuses"] == [130]
    (said,) = found["said"]
    assert said.startswith("testbed: interrupted; continue with  testbed run --resume ")
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows] == [""] * len(rows)
    assert {row["trial"] for row in rows} == {
        json.loads(line)["trial"] for line in (out / "spans.jsonl").read_text().splitlines()
    }
