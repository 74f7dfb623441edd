"""The record of what the testbed has on this machine: removable at whatever moment its maker died."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts import namespaces, processes
from testbed.net.fabric import removal, state
from testbed.net.topology.files import load_topology
from tests.net.conftest import eventually

REPOSITORY = Path(__file__).parents[2]
TOPOLOGY = load_topology("edge-cloud")

pytestmark = pytest.mark.usefixtures("own_state")


def recorded(persistent: bool = False) -> state.State:
    with state.locked():
        return state.new(TOPOLOGY, "direct", persistent=persistent)


def rewrite(network: state.State, **changes: object) -> state.State:
    """The same state with other fields, on disk."""
    fresh = replace(network, **changes)  # type: ignore[arg-type]
    with state.locked():
        state.write(fresh)
    return fresh


def gone_process() -> tuple[int, int]:
    """Pid and start time of a process that has ended."""
    child = subprocess.Popen(["sleep", "100"])
    started = processes.start_time(child.pid)
    assert started is not None
    child.kill()
    child.wait()
    return child.pid, started


def test_a_state_reads_back_as_it_was_written() -> None:
    network = recorded()
    assert state.list_states() == [network]
    assert network.pid == os.getpid()
    assert network.namespaces == tuple(f"tb-{network.id}-{name}" for name in ("edge", "cloud", "wire"))
    assert state.is_alive(network)


def test_a_state_is_dead_when_its_process_is_gone_or_another_has_its_pid_or_the_machine_was_rebooted() -> (
    None
):
    network = recorded()
    pid, started = gone_process()
    assert not state.is_alive(rewrite(network, pid=pid, started=started))
    assert not state.is_alive(rewrite(network, started=network.started + 1))
    assert not state.is_alive(rewrite(network, boot="another"))
    assert state.is_alive(rewrite(network, pid=pid, started=started, persistent=True))
    assert not state.is_alive(rewrite(network, persistent=True, boot="another"))


def test_a_zombie_is_no_running_process() -> None:
    child = subprocess.Popen(["sleep", "100"])
    started = processes.start_time(child.pid)
    assert started is not None
    assert processes.is_running(child.pid, started)
    child.kill()
    assert eventually(lambda: processes.start_time(child.pid) is None)
    assert not processes.is_running(child.pid, started)  # ended, and not yet waited for
    child.wait()


def test_a_process_is_only_ended_if_its_start_time_agrees() -> None:
    child = subprocess.Popen(["sleep", "100"])
    started = processes.start_time(child.pid)
    assert started is not None
    assert not processes.end(child.pid, started + 1)
    assert child.poll() is None
    assert processes.end(child.pid, started)
    assert child.wait(10) == -signal.SIGTERM
    assert not processes.end(os.getpid(), processes.start_time(os.getpid()) or 0)


def test_ids_are_unique_and_checked() -> None:
    network = recorded()
    with state.locked():
        with pytest.raises(UsageError, match="exists already"):
            state.new(TOPOLOGY, "direct", persistent=False, run_id=network.id)
        with pytest.raises(UsageError, match="four hexadecimal digits"):
            state.new(TOPOLOGY, "direct", persistent=False, run_id="../x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"id": "00aa"}',
        b"[" * 100_000,
        json.dumps({"version": 99}).encode(),
    ],
)
def test_a_file_that_is_no_state_is_reported_and_left_alone(own_state: Path, content: bytes) -> None:
    good = recorded()
    bad = own_state / "00aa.json"
    bad.write_bytes(content)
    assert state.list_states() == [good]
    (line,) = state.read_states()[1]
    assert str(bad) in line
    assert "\n" not in line
    assert removal.clean() == []
    assert bad.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"namespaces": ["tb-ffff-edge"]},
        {"namespaces": ["../../etc/passwd"]},
        {"namespaces": ["somebody-elses"]},
        {"id": "../x"},
        {"id": "ffff"},
        {"version": 2},
    ],
)
def test_a_state_that_names_what_is_not_its_own_is_not_believed(
    own_state: Path, changes: dict[str, object]
) -> None:
    network = recorded()
    path = own_state / f"{network.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another", **changes}))
    assert state.list_states() == []
    assert len(state.read_states()[1]) == 1
    assert removal.clean() == []
    assert path.exists()
    path.unlink()


def test_finding_a_network_says_what_there_is() -> None:
    with pytest.raises(UsageError, match="testbed up"):
        state.find()
    first = recorded(persistent=True)
    assert state.find() == state.find(first.id) == first
    second = recorded(persistent=True)
    with pytest.raises(UsageError, match=r"several networks are up .*say which"):
        state.find()
    with pytest.raises(UsageError, match=f"no network 'zzzz'.*{second.id}"):
        state.find("zzzz")


@pytest.mark.netns
def test_down_does_not_take_a_run_at_work_away() -> None:
    network = recorded()
    with pytest.raises(UsageError, match="belongs to a run at work"):
        removal.down(network.id)
    assert state.list_states() == [network]


@pytest.mark.netns
def test_clean_removes_dead_runs_however_much_of_them_was_made_and_nothing_else(own_state: Path) -> None:
    alive, standing, dead = recorded(), recorded(persistent=True), recorded()
    pid, started = gone_process()
    helper = subprocess.Popen(["sleep", "100"])
    bystander = subprocess.Popen(["sleep", "100"])
    began = processes.start_time(helper.pid) or 0
    listed = (state.Process(helper.pid, began, "helper"), state.Process(bystander.pid, began - 1, "not it"))
    dead = rewrite(dead, pid=pid, started=started, processes=listed)
    foreign = f"tb-{dead.id}x-edge"
    with state.locked():
        namespaces.prepare_directory(state.netns_marker())
        namespaces.create_all([f"tb-{dead.id}-edge", f"tb-{alive.id}-edge", foreign], lambda name: None)
        namespaces.path(f"tb-{dead.id}-cloud").touch()  # killed between making the file and mounting it
    (dead.directory / "hosts").mkdir(parents=True)
    (own_state / f".{dead.id}.tmp").write_text("{")  # killed while writing
    try:
        removed = removal.clean()
        assert f"namespace tb-{dead.id}-edge" in removed
        assert f"namespace tb-{dead.id}-cloud" in removed
        assert f"process {helper.pid} (helper)" in removed
        assert helper.wait(10) == -signal.SIGTERM
        assert bystander.poll() is None
        assert {path.name for path in own_state.iterdir()} >= {f"{alive.id}.json", f"{standing.id}.json"}
        assert not [path for path in own_state.iterdir() if dead.id in path.name]
        assert foreign in namespaces.names()
        assert f"tb-{alive.id}-edge" in namespaces.names()
        assert removal.clean() == []
    finally:
        bystander.kill()
        bystander.wait()
        namespaces.delete(foreign)


@pytest.mark.netns
def test_clean_ends_an_emulator_that_was_never_put_on_record_but_no_reader_of_its_files() -> None:
    dead = recorded()
    log = dead.keep / "l0.log"
    log.parent.mkdir(parents=True)
    log.touch()
    with log.open("wb") as writing, log.open("rb") as reading:
        emulator = subprocess.Popen(["sleep", "100"], stderr=writing)
        reader = subprocess.Popen(["sleep", "100"], stdin=reading)
    pid, started = gone_process()
    rewrite(dead, pid=pid, started=started)
    assert f"process {emulator.pid} (working for the network)" in removal.clean()
    assert emulator.wait(10) == -signal.SIGTERM
    assert reader.poll() is None
    reader.kill()
    reader.wait()


ALONE = """
import os, pathlib
from testbed.net.fabric import state
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.files import load_topology
from tests.net.direct import Direct
assert not os.path.exists("/run/netns")
before = pathlib.Path("/proc/self/mountinfo").read_text()
with Fabric.build(load_topology("edge-cloud"), Direct()):
    assert pathlib.Path("/proc/self/mountinfo").read_text() != before
assert not os.path.exists("/run/netns"), "left behind"
assert pathlib.Path("/proc/self/mountinfo").read_text() == before
print(sorted(path.name for path in state.directory().iterdir()))
"""


@pytest.mark.netns
def test_where_there_was_no_run_netns_there_is_none_afterwards() -> None:
    # a mount namespace of its own, with an empty /run
    script = 'mount -t tmpfs none /run && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, ALONE]
    environment = {**os.environ, "TESTBED_STATE": "/run/testbed"}
    answer = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "['.lock']\n", answer.stderr


BUILDER = """
import os, sys
from testbed.net.fabric import removal
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.files import load_topology
from tests.net.direct import Direct
topology = load_topology("shared-bottleneck")
persistent = sys.argv[1] == "up"
Fabric.build(topology, Direct()).close()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            network = Fabric.build(topology, Direct(), run_id="beef", persistent=persistent)
            removal.down("beef") if persistent else network.close()
    print(child, flush=True)
    os.waitpid(child, 0)
    print("reaped", flush=True)
"""


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("how", ["run", "up"])
def test_a_kill_at_any_moment_leaves_nothing_that_clean_does_not_remove(how: str, own_state: Path) -> None:
    moments = random.Random(1)
    dead_runs = 0
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, how],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as builder:
        assert builder.stdin is not None
        assert builder.stdout is not None
        for _ in range(20):
            builder.stdin.write("go\n")
            builder.stdin.flush()
            child = int(builder.stdout.readline())
            time.sleep(moments.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            assert builder.stdout.readline() == "reaped\n"
            dead_runs += len(state.list_states())
            removal.clean()
            for left in state.list_states():
                assert left.persistent  # it was killed after `up` had finished its work
                removal.down(left.id)
            assert state.list_states() == []
            assert not [name for name in namespaces.names() if name.startswith("tb-beef-")]
            assert "tb-beef-" not in Path("/proc/self/mountinfo").read_text()
            assert {path.name for path in own_state.iterdir()} <= {".lock", "netns-directory"}
    assert dead_runs > 0


def test_nobody_else_can_open_the_lock_and_no_link_in_its_place_is_followed(own_state: Path) -> None:
    with state.locked():
        assert (own_state / ".lock").stat().st_mode & 0o777 == 0o600
    (own_state / ".lock").chmod(0o666)  # as it once was
    with state.locked():
        assert (own_state / ".lock").stat().st_mode & 0o777 == 0o600
    (own_state / ".lock").unlink()
    (own_state / ".lock").symlink_to(own_state / "victim")
    with pytest.raises(NetworkError, match=str(own_state)), state.locked():
        pass
    assert not (own_state / "victim").exists()
    (own_state / ".lock").unlink()
    own_state.chmod(0o777)
    with pytest.raises(NetworkError, match="others may write there"), state.locked():
        pass


def test_who_holds_the_lock_is_named_when_it_takes_long(
    own_state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import time; from testbed.net.fabric import state\nwith state.locked():\n print('held', flush=True); time.sleep(3)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with state.locked():
            pass
    said = capfd.readouterr().err
    assert f"waiting for process {holder.pid} (" in said and "state.locked()" in said
    with state.locked():
        pass
    assert capfd.readouterr().err == ""
