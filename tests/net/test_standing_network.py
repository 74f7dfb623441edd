"""A network that is up, and what happens to it: interfaces go down, files and namespaces are deleted, terminals close."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import SpecError
from testbed.hosts import namespaces, processes
from testbed.net.fabric import removal, state
from testbed.net.fabric.description import describe
from testbed.net.fabric.fabric import Fabric, up
from testbed.net.topology.files import load_topology, topology_from
from testbed.net.topology.topology import Topology
from tests.command import hear_signals
from tests.net.conftest import eventually
from tests.net.direct import Direct

REPOSITORY = Path(__file__).parents[2]
EDGE_CLOUD = load_topology("edge-cloud")
PATH_OF_THREE = topology_from(
    {
        "nodes": ["edge", "router", "cloud"],
        "links": [
            {"name": "access", "a": "edge", "b": "router", "profile": "delay=1ms", "congestion": "reno"},
            {"name": "backhaul", "a": "router", "b": "cloud", "profile": "delay=1ms"},
        ],
    },
    "here",
    "three",
)

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120), pytest.mark.usefixtures("own_state")]


def run_testbed(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "testbed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, **options)  # type: ignore[call-overload]


def shown(network: state.State, node: str) -> dict[str, str]:
    """All that the kernel knows in a node that makes packets reach the others."""
    commands = (
        "ip addr",
        "ip route",
        "ip -6 route",
        "ip neigh show nud permanent",
        "ip -6 neigh show nud permanent",
    )
    inside = ["ip", "netns", "exec", network.namespace(node)]
    found = {
        c: subprocess.run([*inside, *c.split()], capture_output=True, text=True).stdout for c in commands
    }
    # Without an interface's own line: whether it has a carrier the kernel tells when it gets round to it.
    lines = {command: sorted(text.splitlines()) for command, text in found.items()}
    return {command: "\n".join(line for line in of if ": eth" not in line) for command, of in lines.items()}


@pytest.mark.parametrize("name", ["access", "edge", "router"])
def test_a_link_that_went_down_comes_up_with_all_that_the_kernel_forgot(name: str) -> None:
    with Fabric.build(PATH_OF_THREE, Direct()) as fabric:
        with state.locked():
            state.write(replace(fabric.state, persistent=True))  # as `up` leaves it
        network = fabric.state
        before = {node: shown(network, node) for node in ("edge", "router", "cloud")}
        for command in ("down", "up"):  # as somebody does without asking us
            subprocess.run(
                ["ip", "-n", network.namespace("edge"), "link", "set", "eth0", command], check=True
            )
        assert shown(network, "edge") != before["edge"]
        assert run_testbed("link", "up", name).returncode == 0
        assert {node: shown(network, node) for node in before} == before
        assert run_testbed("link", "down", name).returncode == 0
        ping = ["-c1", "-W1", "cloud"]
        assert run_testbed("exec", "edge", "--", "ping", *ping).returncode != 0
        for _ in range(2):
            done = run_testbed("link", "up", name)
            assert done.returncode == 0, done.stderr
            assert {node: shown(network, node) for node in before} == before
        for version in ("-4", "-6"):
            answer = run_testbed("exec", "edge", "--", "ping", version, *ping)
            assert answer.returncode == 0, answer.stdout + answer.stderr


def test_an_unknown_link_is_named_with_those_there_are() -> None:
    up(EDGE_CLOUD, emulator=Direct())
    done = run_testbed("link", "down", "acess")
    assert (done.returncode, "did you mean 'access'" in done.stderr) == (2, True)


def test_show_tells_of_a_dead_relay_and_of_a_namespace_that_is_gone() -> None:
    network = up(EDGE_CLOUD, emulator="userspace")
    assert describe(network)["problems"] == []
    assert run_testbed("show").returncode == 0
    (relay,) = network.processes
    os.kill(relay.pid, signal.SIGSTOP)
    assert eventually(lambda: describe(network)["problems"] != [])
    assert "stands still" in describe(network)["problems"][0]
    os.kill(relay.pid, signal.SIGKILL)
    os.waitpid(relay.pid, 0)
    subprocess.run(["ip", "netns", "del", network.namespace("cloud")], check=True)
    done = run_testbed("show")
    assert done.returncode == 1
    assert f"namespace {network.namespace('cloud')} is gone" in done.stdout
    assert f"process {relay.pid} (emulator of link access) has ended" in done.stdout
    assert len(json.loads(run_testbed("show", "--json").stdout)["problems"]) == 2
    removal.down()
    assert not [name for name in namespaces.names() if name.startswith(f"tb-{network.id}-")]


def test_clean_finds_a_network_whose_state_was_deleted_and_nothing_that_only_looks_like_one() -> None:
    network = up(EDGE_CLOUD, emulator="userspace")
    (relay,) = network.processes
    foreign = [f"tb-{network.id}-looks", "tb-0000-like"]
    try:
        for name in foreign:
            subprocess.run(["ip", "netns", "add", name], check=True)
        with Fabric.build(EDGE_CLOUD, Direct()) as alive:
            for one in (network, alive.state):
                state.file_of(one.id).unlink()
            # This process made both, and still runs: it might write them again.
            assert removal.orphans() == {}
            script = "from testbed.net.fabric import removal; print(*removal.clean(), sep='\\n')"
            maker = "from testbed.net.fabric.fabric import up; from testbed.net.topology.files import load_topology; "
            maker += "network = up(load_topology('edge-cloud'), emulator='userspace'); "
            maker += "print(network.id, network.processes[0].pid)"
            run = [sys.executable, "-c"]
            made = subprocess.run(
                [*run, maker], capture_output=True, text=True, cwd=REPOSITORY, check=True
            ).stdout
            lost, pid = made.split()
            state.file_of(lost).unlink()
            shutil.rmtree(state.directory() / lost)
            elsewhere = os.environ | {"TESTBED_STATE": "/nonexistent/of-another-testbed"}
            subprocess.run([*run, script], cwd=REPOSITORY, check=True, env=elsewhere)
            assert len([name for name in namespaces.names() if name.startswith(f"tb-{lost}-")]) == 3
            done = subprocess.run([*run, script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
            assert f"namespace tb-{lost}-edge" in done.stdout
            assert not [name for name in namespaces.names() if name.startswith(f"tb-{lost}-")]
            assert processes.start_time(int(pid)) is None
            assert set(foreign) <= set(namespaces.names())
            assert namespaces.path(alive.namespace("edge")).exists()
            with state.locked():
                state.write(network)
        assert processes.start_time(relay.pid) is not None
    finally:
        for name in foreign:
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_show_tells_of_an_emulator_that_nobody_reaches() -> None:
    """Or, of netem, that somebody took away."""
    network = up(EDGE_CLOUD, emulator="userspace")
    (network.keep / "l0.sock").unlink()
    (problem,) = describe(network)["problems"]
    assert problem.startswith("link access is not as it was made: ")


def test_clean_leaves_a_network_alone_whose_state_it_cannot_read() -> None:
    """As another version of the testbed may have written it."""
    assert run_testbed("up", "edge-cloud", "--emulator", "userspace").returncode == 0
    (id,) = [network.id for network in state.list_states()]
    written = state.file_of(id).read_bytes()
    state.file_of(id).write_bytes(written.replace(b'"version": 1', b'"version": 9'))
    assert state.list_states() == [] and len(state.read_states()[1]) == 1
    assert run_testbed("clean").stdout == "nothing to remove\n"
    assert len([name for name in namespaces.names() if name.startswith(f"tb-{id}-")]) == 3
    state.file_of(id).write_bytes(written)
    assert describe(state.find(id))["problems"] == []


def test_closed_standard_files_do_not_keep_a_network_from_standing() -> None:
    command = f"{sys.executable} -m testbed up edge-cloud --emulator userspace >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], cwd=REPOSITORY, timeout=60).returncode == 0
    (network,) = state.list_states()
    assert describe(network)["problems"] == []
    assert removal.down()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_the_network_is_told_of_removes_it(number: signal.Signals) -> None:
    program = (
        "import os, time; from testbed.net.fabric import description; from testbed.cli import main\n"
        "def slow(*_):\n print('telling', flush=True); time.sleep(30)\n"
        "description._live_counters = slow; main(['up', 'edge-cloud', '--emulator', 'userspace'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "telling\n"
        (network,) = state.list_states()
        running.send_signal(number)
        assert running.wait(30) == 130
    assert state.list_states() == []
    assert not [name for name in namespaces.names() if name.startswith(f"tb-{network.id}-")]


@pytest.mark.parametrize("ends", ["terminal", "kill"])
def test_a_command_in_a_node_ends_with_the_terminal_and_with_whoever_started_it(ends: str) -> None:
    network = up(EDGE_CLOUD, emulator=Direct())
    command = [sys.executable, "-m", "testbed", "exec", "edge", "--", "sleep", "1000"]
    child, terminal = pty.fork()  # the leader of a session of its own, as in a terminal that runs one command
    if child == 0:
        hear_signals()
        os.chdir(REPOSITORY)
        os.execv(command[0], command)
    try:
        assert eventually(lambda: bool(processes.running_inside([network.namespace("edge")])))
        if ends == "kill":
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(terminal)
    assert eventually(lambda: not processes.running_inside([network.namespace("edge")]))
    os.waitpid(child, 0)


def test_a_node_knows_the_host_by_its_name_and_an_unknown_name_is_unknown_at_once() -> None:
    up(PATH_OF_THREE, emulator=Direct())
    own = run_testbed("exec", "edge", "--", "getent", "hosts", socket.gethostname())
    assert (own.returncode, own.stdout.split()[0][:4]) in ((0, "127."), (0, "::1"))
    began = time.monotonic()
    assert run_testbed("exec", "edge", "--", "getent", "hosts", "nowhere.example").returncode == 2
    assert time.monotonic() - began < 3.0  # a name server that does not answer takes five
    assert run_testbed("exec", "edge", "--", "getent", "hosts", "cloud").stdout.split()[1] == "cloud"


def test_no_route_of_a_node_covers_addresses_that_are_no_links() -> None:
    network = up(PATH_OF_THREE, emulator=Direct())
    for node, address in (("edge", "10.0.2.9"), ("router", "10.9.9.9"), ("edge", "192.0.2.1")):
        inside = ["ip", "netns", "exec", network.namespace(node), "ip", "route", "get", address]
        assert subprocess.run(inside, capture_output=True).returncode != 0, (node, address)


def test_a_relative_topology_is_looked_for_beside_the_scenario(tmp_path: Path) -> None:
    from testbed.experiment.plan import load_plan, make_plan

    (tmp_path / "mine.yaml").write_text(
        "nodes: [edge, cloud]\nlinks: [{a: edge, b: cloud, profile: lte, name: mine}]\n"
    )
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text("topology: mine.yaml\nprofiles: [lte]\ntasks: [needle]\n")
    made = load_plan(str(scenario))
    assert made.link == "mine"
    again = make_plan(
        made.scenario.model_dump(mode="json"), "manifest.json"
    )  # from wherever the run is resumed
    assert again.link == "mine" and isinstance(again.topology, Topology)


def test_a_named_network_is_listed_set_and_taken_down_by_its_name() -> None:
    """Also one whose nodes have capitals and underscores; a connection that is there goes on under the other profile."""
    topology = topology_from(
        {"nodes": ["Edge_1", "cloud"], "links": [{"name": "access", "a": "Edge_1", "b": "cloud", "profile": "delay=1ms"}]},
        "here",
        "two",
    )  # fmt: skip
    network = up(topology, {}, "userspace", name="lab")
    try:
        (listed,) = json.loads(run_testbed("ls", "--json").stdout)["networks"]
        assert (listed["id"], listed["name"], listed["state"]) == (network.id, "lab", "up")
        assert "lab" in run_testbed("ls").stdout
        again = run_testbed("up", "edge-cloud", "--name", "lab")
        assert again.returncode == 2 and "a network lab is up already" in again.stderr
        slower = "rate=20mbit,delay=30ms,mtu=1280"
        done = run_testbed("set", "--id", "lab", f"access={slower}")
        assert (done.returncode, done.stdout) == (0, f"access: {slower}\n"), done.stderr
        shown_ = json.loads(run_testbed("show", "--id", "lab", "--json").stdout)
        assert shown_["links"][0]["conditions"] == slower and shown_["name"] == "lab"
        said = run_testbed(
            "exec", "--id", "lab", "Edge_1", "--", "ping", "-c2", "-i0.2", "-q", "cloud"
        ).stdout
        assert float(said.rpartition(" = ")[2].split("/")[0]) > 60  # milliseconds, there and back
        assert run_testbed("set", "--id", "lab", "nothing=lte").returncode == 2
        wrong = run_testbed("set", "--id", "lab", "access")
        assert wrong.returncode == 2 and "write LINK=PROFILE" in wrong.stderr
        with subprocess.Popen(
            [sys.executable, "-m", "testbed", "show", "--id", "lab", "--watch", "0.2"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            preexec_fn=hear_signals,
        ) as watching:
            assert watching.stdout is not None
            lines = iter(watching.stdout)
            assert any("Mbit/s" in line for line in lines)
            watching.send_signal(signal.SIGINT)
            watching.communicate(timeout=20)
        assert watching.returncode == 130
    finally:
        assert run_testbed("down", "--id", "lab").returncode == 0
    assert json.loads(run_testbed("ls", "--json").stdout)["networks"] == []


def test_names_that_differ_in_capitals_alone_are_refused() -> None:
    link = {"a": "Edge", "b": "edge", "profile": "lte"}
    with pytest.raises(SpecError, match="differ in capitals alone"):
        topology_from({"nodes": ["Edge", "edge"], "links": [link]}, "here", "two")
