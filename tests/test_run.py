"""Whole runs with a tiny random model: real namespaces, a real link, real endpoints, and what is left afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kill_resume import host_state, leftovers, settled
from testbed.experiment.plan import load_plan
from testbed.experiment.results import FORMAT, RunDirectory
from testbed.experiment.row import COLUMNS, STAGES
from testbed.experiment.runner import Runner
from testbed.net.fabric.accounting import LATE_S
from tests.analysis.make_run import headline, make_run
from tests.command import command, hear_signals
from tests.runs import SCENARIO, TRIALS, rows, run, undrawn, unmeasured

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("own_state")


@pytest.fixture(scope="module")
def scenario(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "tiny.yaml"
    path.write_text(SCENARIO + f"model: {tiny_model('llama')}\n")
    return path


def made(directory: Path) -> int:
    """How many whole rows a run has."""
    written = directory / "trials.jsonl"
    return written.read_bytes().count(b"\n") if written.exists() else 0


def started(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own, which has made a few trials more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.runs", "run", *arguments, "--accept-uncalibrated"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_signals,
    )  # fmt: skip
    out, deadline = Path(arguments[-1]), time.monotonic() + 100
    enough = made(out) + 3
    while made(out) < enough and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def finished(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, once."""
    before = set(leftovers())
    out = tmp_path_factory.mktemp("run") / "out"
    done = run(str(scenario), "--out", str(out))
    assert done.status == 0, done.errors
    assert re.search(r"figures/ \(\d+, PNG and PDF\)", done.out)
    assert set(leftovers()) == before
    return out


@pytest.mark.netns
@pytest.mark.slow
class TestAWholeRun:
    def test_has_a_row_for_every_trial_with_every_column(self, finished: Path) -> None:
        found = rows(finished)
        assert len(found) == TRIALS
        assert len({row["trial"] for row in found}) == len(found)
        assert all(set(row) == set(COLUMNS) for row in found)
        assert [row["error"] for row in found] == [""] * len(found)

    def test_has_stages_that_sum_to_the_end_to_end_latency(self, finished: Path) -> None:
        for row in rows(finished):
            assert sum(row[stage] for stage in STAGES) == pytest.approx(row["e2e_s"], rel=0, abs=1e-6)

    def test_keeps_the_tokens_that_a_selector_asks_for(self, finished: Path) -> None:
        for row in rows(finished):
            kept = {"q2c": 0.25, "h2o": 0.5, "random": 0.5}.get(row["codec"].split("@")[0], 1.0)
            assert row["tokens_kept"] == pytest.approx(kept * row["context_tokens"], abs=1)

    def test_sends_the_full_cache_exactly(self, finished: Path) -> None:
        full = [row for row in rows(finished) if row["codec"] == "fp16"]
        assert all(row["answer"] == row["reference_answer"].strip() for row in full)
        assert all(row["nll"] == row["reference_nll"] for row in full)
        assert all(row["kl"] == 0 for row in full)
        assert all(row["kl"] > 0 for row in rows(finished) if row["codec"].startswith("q2c"))

    def test_counts_more_bytes_on_the_wire_than_in_the_payload(self, finished: Path) -> None:
        for row in rows(finished):
            if row["placement"] != "edge":
                assert row["wire_bytes"] > row["payload_bytes"] > 0

    def test_never_transmits_faster_than_the_link(self, finished: Path) -> None:
        for row in rows(finished):
            if row["placement"] == "split":
                assert (
                    row["transmit_s"]
                    >= row["payload_bytes"] * 8 / row["rate_up_bps"] + row["delay_up_s"] * 0.99
                )

    def test_says_what_was_reused(self, finished: Path) -> None:
        found = [row for row in rows(finished) if row["codec"] == "int8"]
        assert {row["reused"] for row in found} == {
            "prefill",
            "prefill,select,encode,decode,first_token,generate",
        }

    def test_leaves_the_directory_as_documented(self, finished: Path) -> None:
        names = {path.name for path in finished.iterdir()}
        assert {
            "manifest.json",
            "calibration.json",
            "trials.jsonl",
            "trials.parquet",
            "summary.csv",
            "figures",
        } <= names
        manifest = json.loads((finished / "manifest.json").read_text())
        assert manifest["format"] == FORMAT
        assert manifest["emulator"] in ("netem", "userspace")
        measured = json.loads((finished / "calibration.json").read_text())["measurements"]
        assert len(measured) == 2

    def test_keeps_how_both_sides_computed_and_says_so(self, finished: Path) -> None:
        (start,) = json.loads((finished / "compute.json").read_text())["starts"]
        assert start["alike"] and len(start["measurements"]) >= 2
        for measured in start["measurements"]:
            assert measured["edge"]["median_s"] > 0 and measured["cloud"]["median_s"] > 0
        assert all(row["warnings"] for row in rows(finished) if not row["compute_steady"])
        unsteady = [row for row in RunDirectory(finished).rows() if not row["compute_steady"]]
        table = headline(finished)
        assert f"Compute, measured {len(start['measurements'])} times" in table
        assert ("Compute was out of tolerance" in table) == bool(unsteady)

    def test_keeps_what_the_emulator_counted_during_its_trials(self, finished: Path) -> None:
        kept = json.loads((finished / "counters.json").read_text())
        (start,) = kept["starts"]
        assert kept["link"] == rows(finished)[0]["link"]
        for profile in {row["profile"] for row in rows(finished)}:
            crossing = [
                row for row in rows(finished) if row["profile"] == profile and row["placement"] != "edge"
            ]
            counted = start["profiles"][profile]
            assert counted["trials"] == len(crossing) == 2 * (5 + 1)
            assert counted["up"]["bytes"] > sum(row["payload_bytes"] for row in crossing)
            assert counted["down"]["packets"] > 0
            # Its own frames' headers are in one and not in the other.
            both = counted["up"]["bytes"] + counted["down"]["bytes"]
            assert both == pytest.approx(sum(row["wire_bytes"] for row in crossing), rel=0.05)
            warned = [row for row in crossing if "the emulator" in row["warnings"]]
            assert counted["not_kept_up"] == len(warned)
            late = max(counted[way]["worst_lateness_s"] for way in ("up", "down"))
            lost = sum(counted[way]["overrun"] for way in ("up", "down"))
            assert bool(warned) == (late > LATE_S or lost > 0)

    def test_is_interrupted_and_killed_and_gives_the_same_answers_tokens_and_bytes_when_resumed(
        self, finished: Path, scenario: Path, tmp_path: Path
    ) -> None:
        before, host, out = set(leftovers()), host_state(), tmp_path / "stopped"
        process = started(str(scenario), "--out", str(out))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert f"--resume {out}" in errors
        assert set(leftovers()) == before
        interrupted = made(out)
        with (out / "trials.jsonl").open("a") as file:
            file.write('{"trial": "cut off in the mid')

        process = started("--resume", str(out))
        process.kill()
        process.communicate()
        assert interrupted < made(out) < TRIALS
        subprocess.run([sys.executable, "-m", "testbed", "clean"], cwd=ROOT, check=True, capture_output=True)
        assert set(settled(before)) == before
        assert host_state() == host

        with unmeasured():
            assert run("--resume", str(out)).status == 0
        same = ("answer", "kept_digest", "payload_digest", "payload_bytes", "nll", "score", "error")
        again = [[row["trial"], *(row[key] for key in same)] for row in rows(out)]
        assert sorted(again) == sorted([row["trial"], *(row[key] for key in same)] for row in rows(finished))

    def test_in_shards_and_merged_has_the_same_answers_tokens_and_bytes(
        self, finished: Path, scenario: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "shards"
        with unmeasured():
            for shard in ("1/2", "2/2"):
                done = run(str(scenario), "--shard", shard, "--out", str(out))
                assert done.status == 0, done.errors
                assert f"shard     {shard}" in done.out
            again = run("--resume", str(out), "--shard", "2/2")
            assert again.status == 0 and "every trial has its row" in again.out
            assert command("merge", str(out)).status == 0
        same = ("trial", "answer", "kept_digest", "payload_digest", "payload_bytes", "nll", "score", "error")
        merged, whole = (sorted([r[key] for key in same] for r in rows(path)) for path in (out, finished))
        assert merged == whole
        counted = json.loads((out / "counters.json").read_text())["starts"]
        assert [start["shard"] for start in counted] == ["1/2", "2/2"]
        done = run("--resume", str(out))
        assert done.status == 0 and "is finished" in done.out, done.errors

    def test_says_so_and_stops_where_it_is_finished_already(self, finished: Path, tmp_path: Path) -> None:
        out = tmp_path / "finished"
        shutil.copytree(finished, out)
        (out / "trials.parquet").unlink()
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        done = run("--resume", str(out))
        assert done.status == 0, done.errors
        assert "is finished" in done.out
        assert "building" not in done.errors
        assert (out / "trials.parquet").exists()
        assert {name: (out / name).read_bytes() for name in before} == before

    def test_runs_its_failed_trials_again_when_resumed_and_no_others(
        self, finished: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "failed"
        shutil.copytree(finished, out)
        before = rows(out)
        before[5] |= {"error": "the cloud did not answer", "answer": "", "score": None, "e2e_s": 0.0}
        (out / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
        with unmeasured():
            done = run("--resume", str(out))
        assert done.status == 0, done.errors
        assert rows(out)[:-1] == before
        again, first = rows(out)[-1], rows(finished)[5]
        same = ("trial", "cell", "answer", "score", "nll", "payload_digest", "error")
        assert [again[key] for key in same] == [first[key] for key in same]
        assert again["e2e_s"] > 0
        measured = json.loads((out / "calibration.json").read_text())["measurements"]
        assert [one["profile"] for one in measured][2:] == [again["profile"]]  # no other has trials ahead


def test_rows_that_another_process_adds_before_the_lock_is_had_are_not_repeated(tmp_path: Path) -> None:
    directory = RunDirectory(make_run(tmp_path / "run", examples=1))
    started = Runner(load_plan("quick"), directory, lambda progress: None)
    text = (directory.path / "trials.jsonl").read_text()
    other = json.loads(text.splitlines()[0]) | {"trial": "another's"}
    (directory.path / "trials.jsonl").write_text(text + json.dumps(other) + "\n" + '{"trial": "cut off')
    started._take_up()
    assert "another's" in started._done
    assert (directory.path / "trials.jsonl").read_text().endswith("\n")


@pytest.mark.netem
@pytest.mark.slow
def test_a_whole_run_on_the_kernels_own_emulator(scenario: Path, tmp_path: Path) -> None:
    codecs = ["fp16", "q2c@0.25+int4"]
    with undrawn():
        done = run(str(scenario), "--out", str(tmp_path / "out"), emulator="netem", examples=1, codecs=codecs)
    assert done.status == 0, done.errors
    found = rows(tmp_path / "out")
    assert len(found) == 2 * (2 + 1 + 1)
    assert {(row["emulator"], row["error"]) for row in found} == {("netem", "")}
    assert all(row["answer"] == row["reference_answer"].strip() for row in found if row["codec"] == "fp16")
    assert os.geteuid() == 0


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("at", ["trial", "run"])
def test_every_row_says_where_in_its_trace_it_began(scenario: Path, tmp_path: Path, at: str) -> None:
    out = tmp_path / "out"
    profiles = ["delay=5ms,sine:10mbit..30mbit*2s", "rate=20mbit,delay=5ms"]
    with unmeasured():
        done = run(
            str(scenario), "--out", str(out), "--emulator", "userspace",
            profiles=profiles, at=at, placements=["split", "edge"], codecs=["fp16"],
        )  # fmt: skip
    assert done.status == 0, done.errors
    changing = [row for row in rows(out) if row["profile"].endswith("*2s") and row["placement"] == "split"]
    assert all(row["trace_s"] is None for row in rows(out) if row not in changing)
    assert all(row["error"] == "" and row["rate_up_bps"] == pytest.approx(20e6) for row in changing)
    first, second = (row["trace_s"] for row in changing)
    assert first < 1.0
    assert second < 1.0 if at == "trial" else second > first


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "fate", "said"),
    [
        ("relay", signal.SIGKILL, r"link access: its relay \(process \d+\) ended \(signal SIGKILL\)"),
        ("cloud", signal.SIGKILL, r"the cloud process ended \(signal SIGKILL\)"),
        ("edge", signal.SIGSTOP, r"the edge process \(\d+\) has been stopped for 1\.\d s"),
    ],
)
def test_what_dies_or_stands_still_during_a_trial_ends_the_run_by_name(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, fate: signal.Signals, said: str
) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    monkeypatch.setenv("TESTBED_STATE", str(state))
    struck: list[float] = []

    def strike() -> None:
        while not (out / "trials.jsonl").exists():
            time.sleep(0.05)
        time.sleep(1.0)  # the second trial crosses, which takes some ten seconds
        if who == "relay":
            (kept,) = state.glob("*.json")
            pid = json.loads(kept.read_text())["processes"][0]["pid"]
        else:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            of_role = f"testbed.endpoints.{who}"
            (pid,) = (int(p) for p in children if of_role in Path(f"/proc/{p}/cmdline").read_text())
        os.kill(pid, fate)
        struck.append(time.monotonic())

    threading.Thread(target=strike, daemon=True).start()
    with unmeasured():
        done = run(
            str(scenario), "--out", str(out), "--emulator", "userspace",
            profiles=["rate=100kbit,delay=5ms"], placements=["edge", "split"], codecs=["fp16"],
        )  # fmt: skip
    assert (
        time.monotonic() - struck[0] < 20
    )  # a second or two, and taking the network away, on a busy machine
    assert done.status == 1
    assert re.search(said, done.errors), done.errors
    assert f"--resume {out}" in done.errors
    assert len(rows(out)) == 1
    assert list(state.glob("*.json")) == []  # nothing of its network is left to be removed
