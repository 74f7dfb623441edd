"""What is left on a host, and what is said of it, when something on the way to a program there dies, stands still or is cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import programs
from testbed.endpoints.endpoint import Endpoint, Gone
from testbed.endpoints.protocol import Compute, Hello
from testbed.errors import EndpointError
from testbed.hosts.processes import is_stopped
from testbed.hosts.ssh import Ssh
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.files import load_topology
from tests.hosts import bench as benches
from tests.hosts.bench import Host, assert_nothing_left, bench, wait_for

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]
ROUNDS = int(os.environ.get("TESTBED_ROUNDS", 2))
#: One that leaves when its input ends, and one that does not, and has a child.
LEAVES, STAYS = ["cat"], ["sh", "-c", "trap '' TERM HUP; sleep 1000 & sleep 1001; sleep 1002"]


def keeper(program: int) -> int:
    return int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("argv", [LEAVES, STAYS], ids=["leaves", "stays"])
def test_programs_end_with_their_connection_and_the_host_is_reached_again(
    there: Ssh, edge: Host, argv: list[str]
) -> None:
    for _ in range(ROUNDS):
        with there.start(argv, {}) as process:
            assert process.status() is None and edge.sever()
            assert process.status(5) == 255 and process.stdout.read() == b""
            assert process.last_words() == f"{edge.url}: the connection was lost"
        assert there.run(["echo", "again"]) == (0, b"again\n")
        assert wait_for(lambda: not edge.programs())
        assert there.clean() == []


def test_an_endpoint_whose_connection_is_lost_is_gone_and_that_is_why(edge: Host, tmp_path: Path) -> None:
    with Ssh(edge.url, sys.executable) as there:
        endpoint = Endpoint.start("cloud", there, tmp_path / "log")
        with endpoint.process:
            assert endpoint.call(Hello(), 60)
            edge.sever()
            with pytest.raises(Gone, match=r"the cloud process ended .*: the connection was lost") as caught:
                endpoint.call(Compute(), 60)
            assert "\n" not in str(caught.value) and not endpoint.alive
    assert_nothing_left(edge)


def test_a_program_ends_with_its_keeper_which_leaves_a_record_that_clean_removes(
    there: Ssh, edge: Host
) -> None:
    for _ in range(ROUNDS):
        with there.start(LEAVES, {}) as process:
            os.kill(keeper(process.pid), signal.SIGKILL)
            assert process.status(5) == 255
            assert process.last_words() == f"{edge.url}: its keeper there has ended"
            assert wait_for(lambda: not edge.programs())
            assert there.clean() == [f"{edge.url}: removed the record of process {process.pid} (cat)"]
        assert there.clean() == []


def test_children_that_a_killed_keeper_could_not_end_are_ended_when_the_program_is_stopped(
    there: Ssh, edge: Host
) -> None:
    with there.start(STAYS, {}) as process:
        assert wait_for(lambda: ["sleep", "1000"] in edge.programs().values())
        os.kill(keeper(process.pid), signal.SIGKILL)
        assert wait_for(lambda: process.pid not in edge.programs()) and edge.programs()
    assert process.status() == 255 and wait_for(lambda: not edge.programs())
    (line,) = there.clean()
    assert line.startswith(f"{edge.url}: removed the record of process {process.pid} (sh -c ")


def test_a_program_that_is_stopped_is_ended_and_named(there: Ssh, edge: Host) -> None:
    for _ in range(ROUNDS):
        with there.start(STAYS, {}) as process:
            os.kill(process.pid, signal.SIGSTOP)
            assert process.status(10) == -signal.SIGKILL and process.stopped_s() > 1
            assert "stopped for 1" in process.last_words()
        assert wait_for(lambda: not edge.programs()) and there.clean() == []


ORCHESTRATOR = """
import sys, time
from testbed.hosts.ssh import Ssh
process = Ssh(sys.argv[1]).start(sys.argv[2:], {})
print(process.pid, flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def orchestrator(host: Host, argv: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that has started a program there, and the program's pid."""
    words = [sys.executable, "-c", ORCHESTRATOR, host.url, *argv]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=programs.environment()) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize("argv", [LEAVES, STAYS], ids=["leaves", "stays"])
def test_programs_end_with_an_orchestrator_that_is_killed(there: Ssh, edge: Host, argv: list[str]) -> None:
    for _ in range(ROUNDS):
        with orchestrator(edge, argv) as (process, pid):
            assert wait_for(lambda pid=pid: pid in edge.programs())
            process.kill()
            process.wait()
            assert wait_for(lambda: not edge.programs())
        assert there.clean() == []


def test_clean_ends_what_a_standing_keeper_holds_of_a_dead_run_and_leaves_a_living_ones_alone(
    there: Ssh, edge: Host
) -> None:
    for _ in range(ROUNDS):
        with orchestrator(edge, STAYS) as (process, pid):
            assert there.clean() == []
            assert wait_for(lambda pid=pid: pid in edge.programs())
            stands = keeper(pid)
            os.kill(stands, signal.SIGSTOP)
            assert wait_for(lambda stands=stands: is_stopped(stands)) and there.clean() == []
            process.kill()
            process.wait()
            (line,) = there.clean()
            assert line.startswith(f"{edge.url}: ended process {pid} (sh -c ")
            assert wait_for(lambda: not edge.programs()) and there.clean() == []


def test_what_is_no_record_goes_and_of_another_boot_no_program_is_ended(there: Ssh, edge: Host) -> None:
    """What an older testbed, a full disk or a power cut left; and numbers that are others' since the host started anew."""
    with there.start(LEAVES, {}) as process:
        (written,) = (edge.home / ".local/state/testbed/processes").iterdir()
        record = json.loads(written.read_text())
        stale = {**record, "boot": "another", "owner": {**record["owner"], "pid": 1, "started": 1}}
        written.with_name("stale").write_text(json.dumps(stale))
        nothing = ["", "{}", "[1]", "null", '{"keeper": [1, 2], "pid": 3}', "[" * 100_000]
        wrong = [json.dumps({**record, key: None}) for key in ("keeper", "owner", "argv", "boot")]
        for number, text in enumerate([*nothing, *wrong]):
            written.with_name(f"none{number}").write_text(text)
        notes = written.parents[1] / "files"
        notes.mkdir()
        (notes / "none").write_text("{")
        subprocess.run(["chmod", "-R", "a+rwX", str(notes)], check=True)
        said = there.clean()
        assert sum(line.endswith(", which is no record of ours") for line in said) == len(nothing) + len(
            wrong
        )
        assert said[-1] == f"{edge.url}: removed the record of process {process.pid} (cat)"
        assert process.status() is None and there.clean() == []
        assert wait_for(lambda: not notes.exists()) and [path.name for path in written.parent.iterdir()] == [
            written.name
        ]


def test_a_file_that_is_cut_off_on_its_way_is_not_there_nor_a_part_of_it(
    there: Ssh, edge: Host, tmp_path: Path
) -> None:
    here, ended = tmp_path / "here", []
    with here.open("wb") as file:
        file.truncate(1 << 32)

    def put() -> None:
        try:
            there.put(here, Path("~/there"))
        except EndpointError as error:
            ended.append(str(error))

    def writer() -> int:
        (pid,) = (pid for pid, words in edge.programs().items() if "-I" in words)
        return pid

    for kill in (lambda: edge.sever(), lambda: os.kill(writer(), signal.SIGKILL)):
        assert wait_for(lambda: not edge.programs())  # whose the file of before is
        sending = threading.Thread(target=put)
        sending.start()
        assert wait_for(lambda: any(name.startswith(".there.") for name in edge.files()))
        kill()
        sending.join(20)
        assert not sending.is_alive()
    assert "the connection was lost" in ended[0] and len(ended) == 2
    assert "there" not in edge.files()
    (line,) = there.clean()
    assert line.startswith(f"{edge.url}: removed /home/tb-edge/.there.") and line.endswith(
        "which came in part"
    )


@pytest.mark.slow
def test_a_link_that_is_silent_is_noticed_and_what_ran_behind_it_ended_by_clean(
    there: Ssh, edge: Host
) -> None:
    with there.start(LEAVES, {}) as process:
        started = time.monotonic()
        edge.execute("ip", "link", "set", "mgmt0", "down")
        assert process.status(60) == 255 and "the connection was lost" in process.last_words()
        assert time.monotonic() - started < 45 and process.pid in edge.programs()
        edge.execute("ip", "link", "set", "mgmt0", "up")
        there.clean()  # unless its sshd has been told by now
        assert wait_for(lambda: not edge.programs())


def test_hosts_on_an_emulated_link_are_reached_apart_from_it(tmp_path: Path) -> None:
    with Fabric.build(load_topology("edge-cloud"), "userspace") as fabric:
        nodes = {node: fabric.namespace(node) for node in ("edge", "cloud")}
        with bench(nodes) as hosts, Ssh(hosts["edge"].url) as edge, Ssh(hosts["cloud"].url) as cloud:
            listen = (
                "import socket; s = socket.create_server(('0.0.0.0', 7777)); print(flush=True); "
                "print(s.accept()[1][0])"
            )
            with cloud.start(["python3", "-c", listen], {}) as listening:
                assert listening.stdout.readline() == b"\n"
                connect = f"import socket; socket.create_connection(('{fabric.address('cloud')}', 7777))"
                assert edge.run(["python3", "-c", connect]) == (0, b"")
                assert listening.stdout.readline().decode().strip() == fabric.address("edge")
