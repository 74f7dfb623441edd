"""Whole runs over SSH: edge and cloud on hosts of their own, between them an emulated link that they know nothing of, and the way
to them apart from it. This test is the orchestrator."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from testbed.experiment.deployment import Pair
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.profile import parse_profile
from testbed.net.real.real import Real
from testbed.net.topology.topology import Link, Node, Topology
from tests.command import command, hear_signals
from tests.hosts import bench as benches
from tests.hosts.bench import Host, bench
from tests.runs import rows, run, undrawn, unmeasured

ROOT = Path(__file__).parents[1]
ROUNDS = int(os.environ.get("TESTBED_ROUNDS", 2))
UNDER = "rate=20mbit,delay=5ms"
SCENARIO = """\
name: tiny
placements: [split, cloud, edge]
codecs: [fp16, int8, q2c@0.25+int4]
delivery: [whole, stream(chunk=128)]
tasks: [needle]
context_tokens: 300
examples: 2
threads: 1
max_new_tokens: 6
"""
SAME = (
    "answer",
    "payload_bytes",
    "payload_digest",
    "tokens_kept",
    "kept_digest",
    "kv_bytes",
    "score",
    "nll",
    "kl",
)

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_state"),
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    between = Topology(
        "between", (Node("edge"), Node("cloud")), (Link("access", "edge", "cloud", parse_profile(UNDER)),)
    )
    with Fabric.build(between, "userspace") as fabric:
        nodes = {name: fabric.namespace(name) for name in ("edge", "cloud")}
        with bench(nodes) as made:  # where nobody may look into our directories
            yield made


@pytest.fixture(scope="module")
def scenario(
    tiny_model: Callable[[str], Path], hosts: dict[str, Host], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A scenario whose topology is those hosts."""
    path = tmp_path_factory.mktemp("scenario")
    ends = ", ".join(
        f"{name}: {{host: '{host.url}', python: {sys.executable}, interface: eth0, device: cpu}}"
        for name, host in hosts.items()
    )
    (path / "real.yaml").write_text(
        f"nodes: {{{ends}}}\nlinks: [{{name: access, a: edge, b: cloud, profile: measured}}]\n"
    )
    (path / "tiny.yaml").write_text(f"{SCENARIO}model: {tiny_model('llama')}\ntopology: real.yaml\n")
    return path / "tiny.yaml"


@pytest.fixture
def unmeasured_hosts() -> Iterator[None]:
    """The link is not measured, which passes as a measurement that found nothing."""

    def passed(real: Real, link: str, profile: Any) -> Calibration:
        return Calibration(link, profile.name, real.emulation, (Attempt((), {}),))

    with undrawn(), patch.object(Real, "calibrate", passed):
        yield


def nothing_runs(hosts: dict[str, Host], seconds: float = 10.0) -> bool:
    """Whether no program of ours is left on any host, after so long at most."""
    until = time.monotonic() + seconds
    while any(host.programs() for host in hosts.values()) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(host.programs() for host in hosts.values())


def files_left(hosts: dict[str, Host]) -> list[str]:
    """What lies in the hosts' homes, directories and caches aside."""
    return [
        f"{name}:{path}"
        for name, host in hosts.items()
        for path in host.files()
        if (host.home / path).is_file() and not path.startswith(".cache/")
    ]


def by_cell(found: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = ("placement", "codec", "delivery", "example", "repeat")
    return {tuple(row[key] for key in keys): row for row in found}


def test_a_run_over_ssh_gives_what_the_local_run_gives(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path
) -> None:
    with undrawn():
        there = run(str(scenario), "--out", str(tmp_path / "there"))
    assert there.status == 0, there.errors
    assert nothing_runs(hosts)
    assert files_left(hosts) == []
    with unmeasured():
        here = run(
            str(scenario),
            "--out",
            str(tmp_path / "here"),
            topology="edge-cloud",
            profiles=[UNDER],
            emulator="userspace",
        )
    assert here.status == 0, here.errors
    remote, local = by_cell(rows(tmp_path / "there")), by_cell(rows(tmp_path / "here"))
    assert remote.keys() == local.keys()
    assert len(remote) == len(rows(tmp_path / "there")) == 2 * (2 * 3 + 1 + 1)
    for cell, row in remote.items():
        assert row["error"] == "" and row["emulator"] == "real" and row["profile"] == "measured"
        assert {key: row[key] for key in SAME} == {key: local[cell][key] for key in SAME}, cell
    ratios = [
        remote[cell]["transmit_s"] / local[cell]["transmit_s"]
        for cell in remote
        if cell[0] != "edge"
        and remote[cell]["transmit_s"] is not None
        and local[cell]["payload_bytes"] > 10_000
    ]
    print(
        f"transmit_s over SSH's hosts / local: median {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}"
    )
    manifest = json.loads((tmp_path / "there/manifest.json").read_text())
    assert {side: about["host"] for side, about in manifest["hosts"].items()} == {
        n: h.url for n, h in hosts.items()
    }
    (link,) = json.loads((tmp_path / "there/calibration.json").read_text())["measurements"]
    assert link["ok"] and {check["ok"] for check in link["attempts"][0]["checks"]} == {None}
    assert command("report", str(tmp_path / "there")).status == 0


def test_the_orchestrators_machine_may_be_the_edge(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path
) -> None:
    cloud = hosts["cloud"]
    near = ipaddress.ip_address(cloud.address) - 1  # this end of the way to it, which is the link here
    ends = f"edge: {{host: local, address: {near}}}, cloud: {{host: '{cloud.url}', python: {sys.executable}}}"
    (tmp_path / "laptops.yaml").write_text(
        f"nodes: {{{ends}}}\nlinks: [{{name: access, a: edge, b: cloud, profile: measured}}]\n"
    )
    with undrawn(), unmeasured():
        done = run(
            str(scenario), "--out", str(tmp_path / "out"), topology=str(tmp_path / "laptops.yaml"),
            placements=["split"], codecs=["int8"], delivery=["whole"], examples=1,
        )  # fmt: skip
    assert done.status == 0, done.errors
    assert [row["error"] for row in rows(tmp_path / "out")] == [""]
    assert nothing_runs(hosts)


def test_what_two_clocks_say_is_in_the_rows_of_a_file_that_was_sent_there(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path
) -> None:
    question = {"question": "Which day is it?", "context": "It is Friday. " * 40, "answers": ["Friday"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(question) + "\n")
    tasks = [{"task": "qa", "path": str(tmp_path / "own.jsonl")}]
    with patch.object(Real, "one_clock", False):
        done = run(
            str(scenario), "--out", str(tmp_path / "out"), tasks=tasks, examples=1, context_tokens=None
        )
    assert done.status == 0, done.errors
    for row in rows(tmp_path / "out"):
        crossed = row["placement"] != "edge"
        assert (
            abs(row["clock_offset_s"]) <= row["clock_error_s"] < 1 and (row["clock_error_s"] > 0) == crossed
        )
        told = not crossed or row["clock_error_s"] <= 0.05 * row["transmit_s"] if row["transmit_s"] else None
        assert told or ("transmit_s" in row["warnings"]) == (row["transmit_s"] is None)
    assert nothing_runs(hosts)


def started(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runs", "run", *arguments, "--accept-uncalibrated"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_signals,
    )  # fmt: skip


def rows_in(out: Path) -> int:
    written = out / "trials.jsonl"
    return written.read_bytes().count(b"\n") if written.exists() else 0


def left_there(hosts: dict[str, Host]) -> dict[str, str]:
    """What a run may change of each host: ports, queueing disciplines, interfaces."""
    asked = (("ss", "-Hltun"), ("tc", "qdisc"), ("ip", "-o", "link"))
    return {name: "".join(host.execute(*words) for words in asked) for name, host in hosts.items()}


def end_somewhere(process: subprocess.Popen[str], out: Path, lost: Host | None, chance: random.Random) -> str:
    """Kill a run, or what serves its connections on a host, at some moment of its trials or before them; what it said."""
    rows_ahead, patience = (
        (chance.randint(0, 2), 120.0) if chance.random() < 0.7 else (10**6, chance.uniform(0, 15))
    )
    target, until = rows_in(out) + rows_ahead, time.monotonic() + patience
    while rows_in(out) < target and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    if lost is None:
        process.kill()
    else:
        while process.poll() is None and not lost.sever():  # it is not there yet
            time.sleep(0.01)
    return process.communicate(timeout=120)[1]


@pytest.mark.parametrize("victim", ["orchestrator", "connection"])
def test_a_run_that_is_cut_off_leaves_nothing_and_is_resumed_each_trial_once(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path, victim: str
) -> None:
    """As often as TESTBED_ROUNDS says."""
    out, before, chance, told = tmp_path / "out", left_there(hosts), random.Random(victim), []
    for number in range(ROUNDS):
        begins = (
            ["--resume", str(out)] if (out / "manifest.json").exists() else [str(scenario), "--out", str(out)]
        )
        if begins[0] != "--resume":
            shutil.rmtree(out, ignore_errors=True)
            begins += ["--set", f"examples={2 + ROUNDS}"]
        process = started(*begins)
        lost = None if victim == "orchestrator" else list(hosts.values())[number % 2]
        said = end_somewhere(process, out, lost, chance)
        told.append((process.returncode, rows_in(out)))
        if lost is not None and process.returncode:
            (line,) = [line for line in said.splitlines() if line.startswith("testbed: ")]
            assert process.returncode == 1 and "Traceback" not in said, said
            assert re.search("lost|not reached|ended|no session", line), line
        cleaned = command("clean", str(scenario.parent / "real.yaml"))
        assert cleaned.status == 0, cleaned.errors
        assert nothing_runs(hosts) and files_left(hosts) == [] and left_there(hosts) == before
    with undrawn():
        done = command("run", "--resume", str(out), "--accept-uncalibrated")
    assert done.status == 0, done.errors
    made = rows(out)
    print(f"{victim}: {ROUNDS} times, exit status and rows then: {told}; in the end {len(made)} rows")
    whole = [row["trial"] for row in made if not row["error"]]
    assert len(whole) == len(set(whole)) == (2 + ROUNDS) * (2 * 3 + 1 + 1)
    assert all(row["trial"] in set(whole) for row in made)
    assert nothing_runs(hosts) and left_there(hosts) == before


PHASES: dict[str, tuple[Any, str]] = {
    "loading": (Pair, "load"),
    "preparing": (Pair, "prepare"),
    "listening": (Pair, "serve"),
    "computing": (Pair, "compute"),
    "measuring": (Real, "calibrate"),
    "answering": (Pair, "trial"),
    "examining": (Pair, "outcome"),
}


#: A connection that is lost while hosts are reached is made again.
INTERRUPTED = {"reaching": (Real, "_reach"), **PHASES}


@pytest.mark.usefixtures("unmeasured_hosts")
@pytest.mark.parametrize(
    ("phase", "lost"), list(zip(PHASES, itertools.cycle(("edge", "cloud")), strict=False))
)
def test_a_connection_that_is_lost_ends_the_run_in_one_line_with_whole_rows(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path, phase: str, lost: str
) -> None:
    out, (kind, method) = tmp_path / "out", PHASES[phase]
    before, calls = getattr(kind, method), []

    def losing(*given: Any, **named: Any) -> Any:
        calls.append(method)
        if len(calls) == (4 if method in ("trial", "outcome") else 1):
            assert hosts[lost].sever() > 0
        return before(*given, **named)

    with patch.object(kind, method, losing):
        ended = run(
            str(scenario), "--out", str(out), placements=["cloud", "edge"], codecs=["int8"], examples=6
        )
    assert ended.status == 1, ended.errors
    (said,) = [line for line in ended.errors.splitlines() if line.startswith("testbed: ")]
    assert lost in said
    assert "Traceback" not in ended.errors
    assert all(row["error"] == "" for row in rows(out)) if (out / "trials.jsonl").exists() else True
    assert nothing_runs(hosts)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT is heard, which a shell that puts the tests in the background has ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("unmeasured_hosts", "interrupts")
@pytest.mark.parametrize("phase", INTERRUPTED if ROUNDS > 2 else ("loading", "answering"))
def test_ctrl_c_ends_a_run_with_whole_rows_and_nothing_left(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path, phase: str
) -> None:
    out, (kind, method) = tmp_path / "out", INTERRUPTED[phase]
    before, calls = getattr(kind, method), []

    def pressing(*given: Any, **named: Any) -> Any:
        calls.append(method)
        if len(calls) == (4 if method in ("trial", "outcome") else 1):
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        return before(*given, **named)

    with patch.object(kind, method, pressing):
        ended = run(
            str(scenario), "--out", str(out), placements=["cloud", "edge"], codecs=["int8"], examples=6
        )
        time.sleep(0.1)
    assert ended.status == 130, ended.errors
    assert "Traceback" not in ended.errors
    assert nothing_runs(hosts) and files_left(hosts) == []
    with undrawn():
        done = command("run", "--resume", str(out), "--accept-uncalibrated")
    assert done.status == 0, done.errors
    assert len({row["trial"] for row in rows(out)}) == len(rows(out)) == 6 * 2
    assert not any(row["error"] for row in rows(out))


@pytest.mark.usefixtures("unmeasured_hosts")
def test_a_host_that_starts_anew_amid_a_run_ends_it_and_is_taken_up_again(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path
) -> None:
    out, cloud, trial, calls = tmp_path / "out", hosts["cloud"], Pair.trial, []

    def ending(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            cloud.end()
        return trial(*given, **named)

    with patch.object(Pair, "trial", ending):
        ended = run(
            str(scenario), "--out", str(out), placements=["cloud", "edge"], codecs=["int8"], examples=6
        )
    (said,) = [line for line in ended.errors.splitlines() if line.startswith("testbed: ")]
    assert ended.status == 1 and "cloud" in said and "Traceback" not in ended.errors
    assert not any(row["error"] for row in rows(out))
    for arguments in (("run", "--resume", str(out)), ("clean", str(scenario.parent / "real.yaml"))):
        refused = command(*arguments)
        assert refused.status == 1 and f"{cloud.url}: not reached" in refused.errors
    cloud.start()
    with undrawn():
        done = command("run", "--resume", str(out), "--accept-uncalibrated")
    assert done.status == 0, done.errors
    assert len({row["trial"] for row in rows(out)}) == len(rows(out)) == 6 * 2
    assert command("clean", str(scenario.parent / "real.yaml")).status == 0
    assert nothing_runs(hosts)


@pytest.fixture
def filled(hosts: dict[str, Host]) -> Iterator[Callable[[], None]]:
    """Fills the cloud's disk; behind the test there is room again."""
    cloud = hosts["cloud"]
    cloud.execute("rm", "-rf", f"/home/{cloud.user}/.cache")  # what other tests sent

    def fill() -> None:
        there = os.statvfs(cloud.home)
        size = (there.f_blocks - there.f_bfree) * there.f_frsize + (1 << 18)
        cloud.execute("mount", "-o", f"remount,size={size}", "/home")
        with (
            (cloud.home / "filler").open("wb", buffering=0) as file,
            pytest.raises(OSError, match="No space"),
        ):
            while file.write(bytes(4096)):
                pass

    yield fill
    cloud.execute("mount", "-o", "remount,size=100%", "/home")
    (cloud.home / "filler").unlink(missing_ok=True)


@pytest.mark.usefixtures("unmeasured_hosts")
@pytest.mark.parametrize("phase", ["loading", "answering"])
def test_a_disk_that_fills_up_there_is_one_line_or_hinders_nobody_and_rows_are_whole(
    scenario: Path, hosts: dict[str, Host], filled: Callable[[], None], tmp_path: Path, phase: str
) -> None:
    """What is sent there has no room; trials need none."""
    out, (kind, method) = tmp_path / "out", PHASES[phase]
    before, calls = getattr(kind, method), []

    def filling(*given: Any, **named: Any) -> Any:
        calls.append(method)
        if len(calls) == (4 if method == "trial" else 1):
            filled()
        return before(*given, **named)

    with patch.object(kind, method, filling):
        done = run(
            str(scenario), "--out", str(out), placements=["cloud", "edge"], codecs=["int8"], examples=3
        )
    assert "Traceback" not in done.errors
    if phase == "loading":
        (said,) = [line for line in done.errors.splitlines() if line.startswith("testbed: ")]
        assert done.status == 1 and "No space left on device" in said and "make room there" in said
    else:
        assert done.status == 0 and len(rows(out)) == 3 * 2 and not any(row["error"] for row in rows(out))
    assert nothing_runs(hosts)
    assert {path for path in files_left(hosts) if not path.endswith(":filler")} == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_a_host_has_not_is_one_line_that_names_the_side(
    scenario: Path, hosts: dict[str, Host], tmp_path: Path
) -> None:
    device = {"edge": "cpu", "cloud": "cuda:0"}
    done = run(str(scenario), "--out", str(tmp_path / "out"), device=device)
    (said,) = [line for line in done.errors.splitlines() if line.startswith("testbed: ")]
    assert done.status == 2 and "Traceback" not in done.errors
    assert "cloud: device 'cuda:0': this machine has no CUDA device that torch can use; use cpu" in said
    assert rows_in(tmp_path / "out") == 0 and nothing_runs(hosts)
