"""The fabric: a topology as namespaces and links, and a host that is the same before and after."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2.ethtool.ioctl import IoctlEthtool

from testbed.errors import NetworkError, SpecError, UsageError
from testbed.hosts import namespaces, processes
from testbed.hosts.namespaces import call_in_scratch, call_inside
from testbed.net.emulators.relay.userspace import Userspace
from testbed.net.fabric import removal, state
from testbed.net.fabric.batch import Batch
from testbed.net.fabric.description import describe
from testbed.net.fabric.execute import execute
from testbed.net.fabric.fabric import Fabric, up
from testbed.net.profile.profile import PRESETS, parse_profile
from testbed.net.sockets import enlarge_buffers
from testbed.net.topology.files import load_topology
from testbed.net.topology.topology import Link, Node, Topology
from tests.command import hear_signals
from tests.net.conftest import eventually
from tests.net.direct import Direct

REPOSITORY = Path(__file__).parents[2]
EDGE_CLOUD = load_topology("edge-cloud")

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("own_state")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """One network for the tests that only look at it."""
    directory = str(tmp_path_factory.mktemp("state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", directory)
        fabric = Fabric.build(load_topology("shared-bottleneck"), Direct())
    yield fabric
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", directory)
        fabric.close()


def ours(run_id: str) -> list[str]:
    return [name for name in namespaces.names() if name.startswith(f"tb-{run_id}-")]


def run_in(namespace: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, timeout=30
    )


def host_network() -> dict[str, str]:
    """What the host shows of its network, without what changes by itself."""
    shown = {
        command: subprocess.run(command.split(), capture_output=True, text=True).stdout
        for command in (
            "ip addr",
            "ip route show table all",
            "ip rule",
            "ip neigh show nud permanent",
            "tc qdisc",
        )
    }
    if shutil.which("iptables-save"):
        rules = subprocess.run(["iptables-save"], capture_output=True, text=True).stdout
        shown["iptables-save"] = re.sub(r"^#.*\n|\[\d+:\d+\]", "", rules, flags=re.MULTILINE)
    sysctls = subprocess.run(["sysctl", "-a"], capture_output=True, text=True).stdout
    shown["sysctl net"] = "\n".join(line for line in sysctls.splitlines() if line.startswith("net."))
    shown["ip addr"] = re.sub(r"(valid_lft|preferred_lft) \w+", "", shown["ip addr"])
    shown["ip route show table all"] = re.sub(r"expires \w+", "", shown["ip route show table all"])
    return shown


def test_what_crosses_a_link_is_never_larger_than_the_mtu(shared: Fabric) -> None:
    for name in (shared.namespace("edge1"), shared.state.wire):
        with namespaces.inside(name):
            features = IoctlEthtool("eth0" if name.endswith("edge1") else "l0a").get_features()
        on = {feature for feature, active, *_ in features if active}
        assert not on & {"tx-tcp-segmentation", "tx-generic-segmentation", "tx-udp-segmentation", "rx-gro"}
    if shutil.which("ethtool"):
        listing = run_in(shared.namespace("edge1"), "ethtool", "-k", "eth0").stdout
        for offload in (
            "tcp-segmentation-offload",
            "generic-segmentation-offload",
            "generic-receive-offload",
        ):
            assert f"{offload}: off" in listing


@pytest.mark.parametrize(
    ("profile", "lost"), [("rate=1gbit,delay=2ms", 0), ("rate=1gbit,delay=2ms,loss=50%", 0.5)]
)
def test_datagrams_of_one_system_call_are_counted_and_lost_each_on_its_own(profile: str, lost: float) -> None:
    topology = Topology("one", (Node("a"), Node("b")), (Link("link", "a", "b", parse_profile(profile)),))
    calls, datagrams, size = 20, 40, 1472
    with Fabric.build(topology, Userspace(seed=3)) as fabric:
        with namespaces.inside(fabric.namespace("b")):
            to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            enlarge_buffers(to, 16 << 20, 1 << 20)
            to.bind((fabric.address("b"), 0))
        with namespaces.inside(fabric.namespace("a")):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with to, sender:
            sender.connect(to.getsockname())
            sender.setsockopt(socket.IPPROTO_UDP, 103, size)  # UDP_SEGMENT
            to.settimeout(1)
            received = []
            for call in range(calls):
                sender.send(b"".join(struct.pack("!II", call, n) + bytes(size - 8) for n in range(datagrams)))
                time.sleep(0.005)
            with contextlib.suppress(TimeoutError):
                while True:
                    received.append(to.recv(1 << 16))
        up = fabric.counters("link")["up"]
    assert {len(datagram) for datagram in received} == {size}
    numbers = [struct.unpack_from("!II", datagram) for datagram in received]
    assert numbers == sorted(set(numbers))
    assert up.packets == calls * datagrams and up.bytes == calls * datagrams * (size + 28)
    assert up.delivered == len(received) == up.packets - up.dropped_loss
    # 800 draws: six standard deviations are 0.11
    assert abs(up.dropped_loss / up.packets - lost) <= (0.11 if lost else 0)


def test_bulk_tcp_crosses_two_links_in_packets_of_the_mtu_under_the_links_congestion_control(
    shared: Fabric,
) -> None:
    def received() -> tuple[int, int]:
        with namespaces.inside(shared.namespace("cloud")):
            line = next(
                text for text in Path("/proc/thread-self/net/dev").read_text().splitlines() if "eth0" in text
            )
        counts = line.split(":")[1].split()
        return int(counts[0]), int(counts[1])

    before = received()
    server = subprocess.Popen(
        ["ip", "netns", "exec", shared.namespace("cloud"), "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL
    )
    try:
        client = ["iperf3", "-c", shared.address("cloud"), "-n", "20M", "-J"]
        for _ in range(50):
            report = run_in(shared.namespace("edge1"), *client)
            if '"error"' not in report.stdout:  # the server listens by now; iperf3's status does not tell
                break
            time.sleep(0.1)
        assert '"sender_tcp_congestion":\t"cubic"' in report.stdout
    finally:
        server.terminate()
        server.wait()
    after = received()
    assert after[0] - before[0] > 10_000_000  # iperf3 ends when all is sent, and with what is under way then
    assert (after[0] - before[0]) / (after[1] - before[1]) <= 1514


def packets_seen(namespace: str) -> dict[str, int]:
    """Interface -> packets sent and received."""
    with namespaces.inside(namespace):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    fields = {name.strip(): values.split() for name, _, values in (line.partition(":") for line in lines)}
    return {name: int(values[1]) + int(values[9]) for name, values in fields.items() if name != "lo"}


def test_nothing_travels_on_a_link_but_what_is_sent_on_purpose(shared: Fabric) -> None:
    before = packets_seen(shared.namespace("router"))
    for address in (shared.address("cloud"), "fd00:7462:0:2::2"):
        assert run_in(shared.namespace("edge1"), "ping", "-c1", "-W2", address).returncode == 0
    after = packets_seen(shared.namespace("router"))
    assert {name: after[name] - before[name] for name in after} == {"eth0": 4, "eth1": 0, "eth2": 4}
    with Fabric.build(load_topology("shared-bottleneck"), Direct()) as fresh:
        time.sleep(1.5)  # unsolicited multicast reports come within a second
        for node in ("edge1", "router", "cloud"):
            assert set(packets_seen(fresh.namespace(node)).values()) == {0}


def test_every_node_reaches_every_other_by_name_over_both_families_and_by_address(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Fabric.build(load_topology("shared-bottleneck"), Direct()) as fabric:
        for start, end in itertools.permutations([node.name for node in fabric.topology.nodes], 2):
            for target in (("-4", end), ("-6", end), ("-4", fabric.address(end))):
                assert execute(fabric.state, start, ["ping", *target, "-c1", "-W2"]) == 0, (start, target)
        assert "fd00:7462:0:2::2" in capfd.readouterr().out


def test_many_links_carry_packets_as_soon_as_they_stand(tmp_path: Path) -> None:
    """Left to itself, the kernel makes a hundred interfaces a second ready to send, and drops what others send."""
    path = tmp_path / "many.yaml"
    path.write_text("kind: star\nnodes: 120\nprofile: delay=1ms\n")
    with Fabric.build(load_topology(str(path)), "userspace") as fabric:
        for start in ("n119", "n60", "hub"):
            ping = run_in(fabric.namespace(start), "ping", "-c1", "-W2", fabric.address("n3"))
            assert ping.returncode == 0, f"{start}: {ping.stdout}"


def test_a_topology_without_ipv6_has_none() -> None:
    with Fabric.build(replace(EDGE_CLOUD, ipv6=False), Direct()) as fabric:
        assert "inet6" not in run_in(fabric.namespace("edge"), "ip", "addr", "show", "eth0").stdout
        assert "::1" in run_in(fabric.namespace("edge"), "ip", "addr", "show", "lo").stdout
        assert "fd00" not in fabric.topology.hosts("edge")


def test_tcp_may_use_windows_of_twice_the_bandwidth_delay_product() -> None:
    profile = parse_profile("rate=1gbit,delay=100ms")
    with Fabric.build(EDGE_CLOUD.with_profiles({"access": PRESETS["lte"]}), Direct()) as fabric:

        def limit() -> int:
            return int(
                run_in(fabric.namespace("cloud"), "cat", "/proc/sys/net/ipv4/tcp_rmem").stdout.split()[2]
            )

        assert limit() >= 32_000_000
        fabric.apply("access", profile)
        assert limit() >= 2 * 1e9 / 8 * 0.2
        assert fabric.topology.link("access").profile == profile
        assert state.find(fabric.id).topology.link("access").profile == profile


def test_the_host_is_the_same_before_during_and_after() -> None:
    before = host_network()
    with Fabric.build(load_topology("shared-bottleneck"), Direct()) as fabric:
        run_id = fabric.id
        assert len(ours(run_id)) == 5
        during = host_network()
    assert during == before
    assert host_network() == before
    assert ours(run_id) == []
    assert f"tb-{run_id}-" not in Path("/proc/self/mountinfo").read_text()


def test_close_can_be_called_twice_and_ends_what_runs_inside() -> None:
    fabric = Fabric.build(EDGE_CLOUD, Direct())
    run_id, directory = fabric.id, fabric.state.directory
    lasting = subprocess.Popen(["ip", "netns", "exec", fabric.namespace("edge"), "sleep", "100"])
    home = Path("/proc/self/ns/net").readlink()
    assert eventually(lambda: Path(f"/proc/{lasting.pid}/ns/net").readlink() != home)
    fabric.close()
    fabric.close()
    assert lasting.wait(10) == -signal.SIGTERM
    assert not ours(run_id)
    assert not directory.exists()
    assert state.list_states() == []
    with pytest.raises(NetworkError, match="closed"):
        fabric.address("edge")


@pytest.mark.parametrize("error", [NetworkError("this link fails"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_build_that_fails_or_is_interrupted_midway_leaves_nothing(error: BaseException) -> None:
    before = set(namespaces.names())
    emulator = Direct(failing_at="l2", error=error)
    with pytest.raises(type(error)):
        Fabric.build(load_topology("shared-bottleneck"), emulator)
    assert {name for name in namespaces.names() if name.startswith("tb-")} <= before
    assert state.list_states() == []
    assert [link.detached for link in emulator.links] == [1, 1]


def test_an_unknown_congestion_control_is_the_users_mistake_and_leaves_nothing() -> None:
    topology = Topology(
        "t", (Node("edge"), Node("cloud")), (Link("access", "edge", "cloud", PRESETS["lte"], "warpspeed"),)
    )
    with pytest.raises(UsageError, match=r"congestion control 'warpspeed': this kernel offers .*cubic"):
        Fabric.build(topology, Direct())
    assert state.list_states() == []


def test_building_never_moves_any_thread_to_another_namespace() -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    seen: set[Path] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(Path("/proc/thread-self/ns/net").readlink())

    watcher = threading.Thread(target=watch)
    watcher.start()
    fabrics: list[Fabric] = []
    builders = [
        threading.Thread(target=lambda: fabrics.append(Fabric.build(EDGE_CLOUD, Direct()))) for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    stop.set()
    watcher.join()
    assert len({fabric.id for fabric in fabrics}) == 3
    for fabric in fabrics:
        fabric.close()
    assert seen == {home}
    assert Path("/proc/thread-self/ns/net").readlink() == home


def test_inside_brings_the_thread_back_after_an_error(shared: Fabric) -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    with pytest.raises(ValueError, match="boom"), namespaces.inside(shared.state.wire):
        assert Path("/proc/thread-self/ns/net").readlink() != home
        raise ValueError("boom")
    assert Path("/proc/thread-self/ns/net").readlink() == home
    with pytest.raises(NetworkError, match="tb-none-here"), namespaces.inside("tb-none-here"):
        pass


def test_no_descriptor_stays_open() -> None:
    Fabric.build(EDGE_CLOUD, Direct()).close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        Fabric.build(EDGE_CLOUD, Direct()).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_unknown_nodes_and_links_are_refused_by_name(shared: Fabric) -> None:
    with pytest.raises(SpecError, match=r"no node 'edge'; did you mean 'edge.'"):
        shared.namespace("edge")
    with pytest.raises(SpecError, match="no link 'backhall'; did you mean 'backhaul'"):
        shared.counters("backhall")


def test_a_command_in_a_node_knows_the_others_by_name_and_sees_its_own_interfaces(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Fabric.build(load_topology("shared-bottleneck"), Direct()) as fabric:
        hosts, mounts = Path("/etc/hosts").read_text(), Path("/proc/self/mountinfo").read_text()
        assert execute(fabric.state, "edge1", ["ping", "-c1", "-W2", "cloud"]) == 0
        assert execute(fabric.state, "edge1", ["sh", "-c", "cat /etc/hosts; ls /sys/class/net; exit 7"]) == 7
        shown = capfd.readouterr().out
        assert fabric.topology.hosts("edge1") in shown
        assert shown.split()[-2:] == ["eth0", "lo"]
        assert Path("/etc/hosts").read_text() == hosts
        assert Path("/proc/self/mountinfo").read_text() == mounts
        assert execute(fabric.state, "edge1", ["sh", "-c", "kill -TERM $$"]) == 128 + signal.SIGTERM
        with pytest.raises(UsageError, match="no-such-command: No such file"):
            execute(fabric.state, "edge1", ["no-such-command"])
        with pytest.raises(UsageError, match="no command"):
            execute(fabric.state, "edge1", [])


def test_a_signal_to_the_testbed_reaches_the_command() -> None:
    with Fabric.build(EDGE_CLOUD, Direct()) as fabric:
        program = (
            "import sys; from testbed.net.fabric import state; from testbed.net.fabric.execute import execute; "
            f"sys.exit(execute(state.find({fabric.id!r}), 'edge', ['sh', '-c', sys.argv[1]]))"
        )
        script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
        with subprocess.Popen(
            [sys.executable, "-c", program, script],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=hear_signals,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "caught\n"
            assert child.wait(10) == 5


def test_a_link_settles_when_its_last_packets_have_left_and_not_while_traffic_goes_on() -> None:
    slow, fast = parse_profile("rate=5mbit,delay=150ms"), parse_profile("rate=5mbit,delay=15ms")
    link = EDGE_CLOUD.links[0].name
    with Fabric.build(EDGE_CLOUD.with_profiles({link: slow}), "userspace") as fabric:
        address = fabric.address("cloud")
        datagrams = call_inside(
            fabric.namespace("edge"), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        )
        with datagrams:
            datagrams.sendto(b"x", (address, 9))
            began = time.monotonic()
            assert fabric.settle(link)
            assert time.monotonic() - began > 0.3  # there, and back: nobody listens
            datagrams.sendto(b"x", (address, 9))
            assert not fabric.settle(link, 0.05)
            fabric.apply(link, fast)
            assert fabric.counters(link)["up"].cleared == 1
            fabric.apply(link, slow)
            assert fabric.settle(link)
            datagrams.sendto(b"x", (address, 9))
            assert fabric.hurry(link) and fabric.settle(link, 0.05)
            fabric.apply(link, slow)
            counted = fabric.counters(link)
            assert (counted["up"].cleared, counted["down"].cleared) == (1, 0)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_relay_that_dies_or_stands_still_is_noticed_and_named_with_its_link(fate: signal.Signals) -> None:
    said = {signal.SIGKILL: r"ended \(signal SIGKILL\)", signal.SIGSTOP: "has been stopped for 1"}[fate]
    with Fabric.build(EDGE_CLOUD, "userspace") as fabric:
        fabric.check()
        link, (relay, *_) = fabric.topology.links[0].name, fabric.state.processes
        os.kill(relay.pid, fate)
        deadline = time.monotonic() + 10
        with pytest.raises(NetworkError, match=rf"link {link}: its relay \(process {relay.pid}\) {said}"):
            while time.monotonic() < deadline:
                fabric.check()
                time.sleep(0.1)


def test_without_root_nothing_is_touched() -> None:
    # loaded as root first, since another user may not be allowed to read the files
    program = (
        "import os, testbed.net.fabric.fabric as fabric\n"
        "from testbed.errors import UsageError\n"
        "from testbed.net.topology.files import load_topology\n"
        "topology = load_topology('edge-cloud')\n"
        "os.setgroups([]); os.setresuid(65534, 65534, 65534)\n"
        "for call in (lambda: fabric.Fabric.build(topology), lambda: fabric.up(topology)):\n"
        "    try: call()\n"
        "    except UsageError as error: print(error)\n"
    )
    before = host_network(), set(namespaces.names())
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == 2 * "building a network needs root: run it as sudo testbed …\n", answer.stderr
    assert (host_network(), set(namespaces.names())) == before
    assert not state.directory().exists()


def test_a_network_that_is_up_stays_until_it_is_taken_down() -> None:
    network = up(EDGE_CLOUD, {"access": PRESETS["lte"]}, Direct())
    assert state.find() == network
    assert removal.clean() == []
    shown = describe(network)
    assert [node["namespace"] for node in shown["nodes"]] == [
        f"tb-{network.id}-edge",
        f"tb-{network.id}-cloud",
    ]
    assert shown["links"][0]["profile"] == "lte"
    assert shown["links"][0]["counters"] is None  # this emulator cannot be found again
    assert f"namespace tb-{network.id}-wire" in removal.down()
    assert not ours(network.id)
    with pytest.raises(UsageError, match="no network is up"):
        removal.down()


def test_a_network_that_is_up_answers_with_live_counters_and_goes_without_a_trace() -> None:
    """The same with a real emulator, which outlives the process that made it."""
    program = (
        "from testbed.net.fabric.fabric import up; from testbed.net.topology.files import load_topology; "
        "from testbed.net.profile.profile import parse_profile; "
        "print(up(load_topology('edge-cloud'), {'access': parse_profile('delay=20ms')}).id)"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    if "UsageError" in made.stderr:
        pytest.skip(f"no emulator runs here: {made.stderr.splitlines()[-1]}")
    network = state.find(made.stdout.strip())
    ping = run_in(network.namespace("edge"), "ping", "-c4", "-i0.2", network.topology.address("cloud"))
    times = [float(value) for value in re.findall(r"time=([\d.]+) ms", ping.stdout)]
    assert len(times) == 4
    assert min(times) >= 40  # twice the one-way delay, which nothing can be faster than
    counters = describe(network)["links"][0]["counters"]
    assert counters["up"]["packets"] == counters["down"]["packets"] == 4
    assert counters["up"]["bytes"] == 4 * 84  # ping's 56 bytes, 8 of ICMP, 20 of IP
    removal.down()
    assert not ours(network.id)
    assert all(not processes.is_running(helper.pid, helper.started) for helper in network.processes)


def captured(path: Path) -> list[tuple[int, bytes]]:
    """The packets of a capture file, read straight after the format's description: (length, first bytes)."""
    data = path.read_bytes()
    magic, major, minor, _, _, snap, kind = struct.unpack_from("=IHHiIII", data)
    assert (magic, major, minor, kind) == (0xA1B23C4D, 2, 4, 1)
    packets, at = [], 24
    while at < len(data):
        _, _, kept, length = struct.unpack_from("=IIII", data, at)
        assert kept == min(length, snap)
        packets.append((length, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return packets


def test_packets_of_a_link_are_captured_at_both_ends_until_the_network_is_gone(tmp_path: Path) -> None:
    topology = replace(EDGE_CLOUD, links=(replace(EDGE_CLOUD.links[0], pcap=True),))
    with Fabric.build(topology, Direct(), captures=tmp_path / "captures") as fabric:
        (process,) = fabric.state.processes
        run_in(fabric.namespace("edge"), "ping", "-c2", "-i0.05", "-s1000", fabric.address("cloud"))
    assert not processes.is_running(process.pid, process.started)
    for name in ("access-edge", "access-cloud"):
        packets = captured(tmp_path / "captures" / f"{name}.pcap")
        assert [length for length, _ in packets] == [1042] * 4
        sources = [packet[26:30] for _, packet in packets]
        assert sources == [bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))] * 2


def test_a_capture_ends_with_the_process_that_built_the_network(tmp_path: Path) -> None:
    program = (
        "import os, signal; from dataclasses import replace; from pathlib import Path\n"
        "from testbed.net.fabric.fabric import Fabric\n"
        "from testbed.net.topology.files import load_topology; from tests.net.direct import Direct\n"
        "made = load_topology('edge-cloud'); made = replace(made, links=(replace(made.links[0], pcap=True),))\n"
        f"fabric = Fabric.build(made, Direct(), captures=Path({str(tmp_path)!r}))\n"
        "print(*fabric.state.processes[0].__dict__.values(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    pid, started = map(int, made.stdout.split()[:2])
    assert eventually(lambda: not processes.is_running(pid, started))
    assert removal.clean() != []


def test_a_request_that_the_kernel_refuses_is_named_and_those_behind_it_are_done_all_the_same() -> None:
    def work() -> str:
        with Batch("here") as batch:
            batch.route("replace", oif=1, dst="10.9.0.0/24", gateway="192.0.2.1")
            for number in range(300):  # more than are sent at once
                batch.addr("replace", index=1, address=f"10.0.{number // 200}.{number % 200}", prefixlen=24)
            with pytest.raises(
                NetworkError, match=r"^here: route to 10\.9\.0\.0/24: Network is (down|unreach)"
            ):
                batch.send()
        return subprocess.run(["ip", "-4", "addr", "show", "lo"], capture_output=True, text=True).stdout

    assert call_in_scratch(work).count("inet 10.") == 300
