"""Runs on a Ray cluster: real raylets, workers that die, and rows as without a cluster."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cluster_kills
from benchmarks.kill_resume import leftovers
from testbed.errors import StorageError
from testbed.experiment import cluster
from testbed.experiment.environment import host_name
from testbed.experiment.lanes import Lanes
from testbed.experiment.plan import load_plan
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import begin
from testbed.experiment.shard import Shard
from testbed.hosts import rootless
from tests.command import command
from tests.net.test_rootless import REPOSITORY, opened
from tests.runs import SCENARIO, run, undrawn

ONE = {"profiles": ["rate=50mbit,delay=1ms"], "placements": ["split"], "codecs": ["fp16", "q2c@0.25+int4"]}


@pytest.fixture(scope="module")
def scenario(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "tiny.yaml"
    lines = [line for line in SCENARIO.splitlines() if line.partition(":")[0] not in (*ONE, "examples")]
    settings = [
        *lines,
        *(f"{key}: {value}" for key, value in ONE.items()),
        "examples: 16",
        "emulator: userspace",
    ]
    path.write_text("\n".join([*settings, f"model: {tiny_model('llama')}"]) + "\n")
    return path


@pytest.fixture(scope="module")
def alone(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with undrawn():
        assert run(str(scenario), "--out", str(out)).status == 0
    return out


@pytest.fixture(scope="module")
def machines(own_state: None) -> Iterator[cluster_kills.Machines]:
    started = cluster_kills.Machines(2)
    yield started
    started.close()


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.usefixtures("own_state")
class TestACluster:
    def test_of_two_machines_makes_what_one_does_and_keeps_what_each_measured(
        self, scenario: Path, alone: Path, machines: cluster_kills.Machines, tmp_path: Path
    ) -> None:
        out, before = tmp_path / "out", set(leftovers())
        with undrawn():
            done = command(
                "run", str(scenario), "--ray", machines.address, "--out", str(out), "--accept-uncalibrated"
            )
        assert done.status == 0, done.errors
        assert cluster_kills.rows(out) == cluster_kills.rows(alone)
        assert len(RunDirectory.open(out).entries("calibration.json", "measurements")) == 2
        assert set(leftovers()) == before

    def test_loses_a_worker_a_machine_and_its_driver_but_no_trial(
        self, scenario: Path, alone: Path, machines: cluster_kills.Machines, tmp_path: Path
    ) -> None:
        before = set(leftovers())
        met = cluster_kills.killed(
            str(scenario), tmp_path / "out", machines, [*cluster_kills.KINDS], random.Random(1), within_s=0.1
        )
        assert [met[kind] for kind in cluster_kills.KINDS] == [1, 1, 1]
        assert cluster_kills.rows(tmp_path / "out") == cluster_kills.rows(alone)
        assert command("clean").status == 0
        assert set(leftovers()) == before

    def test_without_lanes_is_refused_with_the_remedy(self, scenario: Path, tmp_path: Path) -> None:
        started = cluster_kills.Machines(0)
        try:
            ended = command("run", str(scenario), "--ray", started.address, "--out", str(tmp_path / "out"))
        finally:
            started.close()
        assert (ended.status, ended.errors.count("\n")) == (2, 1)
        assert "ray start --resources" in ended.errors


def test_a_worker_with_another_testbed_says_so() -> None:
    (_, host), (end, status, why) = cluster.work("0" * 16, b"", ())
    assert (host, end, status) == (host_name(), "end", 2)
    assert "is not the one that drives the cluster" in why


def test_a_machine_with_more_lanes_than_it_was_measured_to_carry_makes_nothing(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(load_plan(str(scenario)), tmp_path / "run")
    nodes = [{"NodeID": name, "Resources": {cluster.LANE: float(own)}} for name, own in (("a", 1), ("b", 4))]
    known = Lanes(machine={}, emulator="userspace", profile="5g-good", rate_bps=1e8, replayed=8, computing=2)
    monkeypatch.setattr("testbed.experiment.environment.lanes", lambda: known)
    for node, said in (("a", ""), ("b", "4 lanes that compute: this machine was measured to carry 2; ")):
        context = SimpleNamespace(get_node_id=lambda node=node: node)
        ray = SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda context=context: context)
        monkeypatch.setattr(cluster, "_ray", lambda ray=ray: ray)
        assert cluster._crowded(tmp_path / "run").startswith(said)
        assert bool(said) == bool(cluster._crowded(tmp_path / "run"))


def test_lines_come_whole_and_spans_before_the_rows_that_they_are_of(tmp_path: Path) -> None:
    sent: dict[Path, int] = {}
    (tmp_path / "spans.jsonl").write_bytes(b'{"trial": "a"}\n{"tri')
    (tmp_path / "trials.jsonl").write_bytes(b'{"trial": "a"}\n')
    (tmp_path / "manifest.json").write_text("{}")
    kinds = [message[:2] for message in cluster._written(tmp_path, sent)]
    assert [kinds[0][0], *kinds[1:]] == ["files", ("lines", "spans.jsonl"), ("lines", "trials.jsonl")]
    with (tmp_path / "spans.jsonl").open("ab") as spans:
        spans.write(b'al": "b"}\n')
    assert list(cluster._written(tmp_path, sent)) == [("lines", "spans.jsonl", b'{"trial": "b"}\n')]
    assert not list(cluster._written(tmp_path, sent))


#: As a plain user of a machine where nobody but root may have user namespaces.
POWERLESS = """
set -e
read mapped
{opened}
sh -c 'echo {allowed} > /proc/sys/user/max_user_namespaces'
cd {repository}
exec setpriv --reuid=1000 --regid=1000 --clear-groups env HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \\
    {python} -m testbed {arguments}
"""


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.skipif(bool(rootless.obstacle()), reason="no user namespaces")
@pytest.mark.parametrize(
    ("allowed", "more", "said"),
    [
        (
            0,
            "--rootless",
            "and --rootless does not work there either: start its Ray as root, or allow it (rootless: ",
        ),
        (100, "", "run with --rootless, which works there, or start its Ray as root"),
    ],
)
def test_a_worker_that_may_build_no_network_says_so_and_what_would_do(
    allowed: int, more: str, said: str, scenario: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    needed = (tmp_path, scenario.parent, tiny_model("llama"))
    for place in (*needed, *tiny_model("llama").iterdir()):
        place.chmod(0o777)
    script = POWERLESS.format(
        repository=REPOSITORY,
        opened=opened(REPOSITORY, Path(sys.base_prefix), *needed),
        allowed=allowed,
        python=sys.executable,
        arguments=f"run {scenario} --ray local --out {tmp_path}/out {more}",
    )
    with subprocess.Popen(
        ["unshare", "--user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as ended:  # fmt: skip
        process = Path(f"/proc/{ended.pid}")
        while (process / "ns/user").readlink() == Path("/proc/self/ns/user").readlink():
            time.sleep(0.01)
        for ids in ("uid_map", "gid_map"):
            (process / ids).write_text("0 0 65536")
        errors = ended.communicate("mapped\n", timeout=120)[1]
    assert ended.returncode == 1, errors
    assert f" on {host_name()}: Ray runs there as user 1000, who may build no network" in errors
    assert said in errors


@pytest.mark.parametrize(
    ("manifest", "status", "error"),
    [
        ({}, 1, "no network"),  # it never came so far as to know its trials
        ({"trials": 2}, 1, "no network"),
        ({"trials": 1}, 1, ""),  # of which one failed
        ({"trials": 1}, 2, "no network"),
        ({}, 0, ""),  # of more shards than examples
    ],
)
def test_a_shard_that_ended_without_all_of_its_rows_says_why(
    manifest: dict[str, int], status: int, error: str, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    row = {"trial": "a", "task": "needle", "example": "1", "placement": "split", "error": "lost"}
    (tmp_path / "trials.jsonl").write_text(json.dumps(row) + "\n")
    share = cluster._Share(Shard(1, 2), RunDirectory(tmp_path))
    driver = object.__new__(cluster._Driver)
    driver._receive(share, ("end", status, "no network"))
    assert (share.error, share.ended) == (error, True)


@pytest.mark.parametrize("name", ["../left", "/left", "a/../../left"])
def test_files_that_lead_out_of_a_run_are_refused(name: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name if name[0] != "/" else f"{tmp_path}{name}"), io.BytesIO())
    (tmp_path / "run").mkdir()
    with pytest.raises(StorageError):
        cluster._unpack(data.getvalue(), tmp_path / "run")
    assert not list(tmp_path.rglob("left"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ray", "local", "--shard", "1/2"],
        ["--ray", "auto", "--lanes", "2"],
        ["--lanes", "2"],
        ["--shards", "2"],
        ["--ray", "127.0.0.1:1"],
        ["--ray", "ray://127.0.0.1:1"],
        ["--ray", "somewhere"],
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("run", "quick", *arguments)
    assert (ended.status, ended.errors.count("\n")) == (2, 1), ended.errors
    assert not list(tmp_path.iterdir())


class TestAnAddressWhereNoClusterIs:
    @pytest.fixture
    def other(self) -> Iterator[str]:
        """Somebody who listens, and says something else."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"127.0.0.1:{listening.getsockname()[1]}"

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(cluster, "_KNOCK_S", 0.3)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    def test_is_one_line_within_seconds_whoever_listens_there(self, said: bytes, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def answer() -> None:
                talking, _ = listening.accept()
                talking.sendall(said)
                with talking, contextlib.suppress(ConnectionError):
                    while talking.recv(1024):
                        pass

            talking = threading.Thread(target=answer)
            talking.start()
            address = f"127.0.0.1:{listening.getsockname()[1]}"
            ended = command("run", "quick", "--ray", address, "--out", str(tmp_path / "out"))
            talking.join()
        assert (ended.status, ended.errors.count("\n")) == (2, 1)
        assert f"--ray {address}: cannot be reached" in ended.errors
        assert not (tmp_path / "out").exists()

    def test_is_named_with_who_said_it(
        self, other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        noted = tmp_path / "ray" / "ray_current_cluster"
        noted.parent.mkdir()
        noted.write_text(other)
        ended = command("run", "quick", "--ray", "auto")
        assert ended.status == 2 and f"--ray auto ({other}, by {noted}): cannot be reached" in ended.errors
        monkeypatch.setenv("RAY_ADDRESS", other)
        ended = command("run", "quick", "--ray", "auto")
        assert ended.status == 2 and f"--ray auto (RAY_ADDRESS={other}): cannot be reached" in ended.errors


def test_nothing_imports_ray_where_no_cluster_is_asked_for() -> None:
    asked = "import sys, testbed.cli.run, testbed.experiment.cluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False, env=dict(os.environ)).returncode == 0
