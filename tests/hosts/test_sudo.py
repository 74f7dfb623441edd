"""What takes root on a host, and how to give its user only that: the page's line for sudo, as it is written there, alone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import NetworkError, UsageError
from testbed.hosts.asking import asked
from testbed.hosts.ssh import Ssh
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.trace import Way
from testbed.net.real.shaping import Shaping, clean
from tests.hosts import bench as benches
from tests.hosts.bench import Host, bench, cable, wait_for

MISSING = benches.missing() or ("" if shutil.which("sudo") else "needs sudo")

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")]

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
ROUNDS = 10


def line_for_sudo() -> str:
    """As the page has it, for a user called lab."""
    (line,) = re.findall(r"^ *`(lab ALL=.*)`$", PAGE.read_text(), re.MULTILINE)
    return f"{line}\n"


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    sudoers = re.sub("^lab ", "{user} ", line_for_sudo())
    with bench("edge", "cloud", sudoers=sudoers) as made, cable(made["edge"], made["cloud"]):
        yield made


@pytest.fixture(scope="module")
def edge(hosts: dict[str, Host]) -> Host:
    return hosts["edge"]


def state(host: Host) -> tuple[str, str]:
    """Queueing disciplines and interfaces."""
    return host.execute("tc", "qdisc"), host.execute("ip", "-o", "link")


def helpers(host: Host) -> list[int]:
    """Root's Pythons there: who watches, and who works."""
    found = []
    for pid, words in host.programs().items():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            if Path(words[0]).name.startswith("python3") and Path(f"/proc/{pid}").stat().st_uid == 0:
                found.append(pid)
    return sorted(found)


def test_the_pages_line_is_one_that_sudo_takes(tmp_path: Path) -> None:
    (tmp_path / "lab").write_text(line_for_sudo())
    subprocess.run(["visudo", "-cf", str(tmp_path / "lab")], check=True, capture_output=True)


def test_a_user_who_has_that_line_alone_can_shape_and_do_nothing_else_as_root(edge: Host, there: Ssh) -> None:
    assert there.run(["sudo", "-n", "id"])[0] == 1
    assert there.run(["sudo", "-n", "/usr/bin/python3", "-c", "1"])[0] == 1
    assert asked(there, "/usr/bin/python3", "survey")["sudo"] == "yes"
    before = state(edge)
    with Shaping(there, "eth0", "10.98.0.2") as shaping:
        shaping.check()
        assert "clsact" in state(edge)[0] and len(helpers(edge)) == 2
    assert wait_for(lambda: state(edge) == before and not helpers(edge))


def test_the_interface_by_which_ssh_came_is_found_through_sudo_and_refused(edge: Host, there: Ssh) -> None:
    ours = there.addresses()[0]
    refused = pytest.raises(UsageError, match=rf"mgmt0 carries the SSH connection \({ours}\)")
    with refused, Shaping(there, "mgmt0", ours):
        pass


def test_whatever_dies_what_was_shaped_over_ssh_is_undone(edge: Host) -> None:
    before = state(edge)
    for _ in range(ROUNDS):
        with Ssh(edge.url) as there, Shaping(there, "eth0", "10.98.0.2") as shaping:
            assert state(edge) != before and edge.sever()
            assert wait_for(lambda: state(edge) == before and not helpers(edge))
            with pytest.raises(NetworkError, match=r"has ended.*the connection was lost"):
                shaping.check()
    for which in (0, -1):  # who watches, who works
        with Ssh(edge.url) as there, Shaping(there, "eth0", "10.98.0.2"):
            os.kill(helpers(edge)[which], signal.SIGKILL)
            if which:
                assert wait_for(lambda: state(edge) == before)
        assert wait_for(lambda: state(edge) == before and not helpers(edge))
    with Ssh(edge.url) as there:
        with Shaping(there, "eth0", "10.98.0.2"):
            for pid in helpers(edge):
                os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not helpers(edge)) and state(edge) != before
        assert clean(there) == ["eth0"] and state(edge) == before
        assert clean(there) == []


@pytest.mark.netem
def test_a_profile_put_there_over_ssh_is_met_and_undone_with_the_connection(edge: Host) -> None:
    before = state(edge)
    for lost in (False, True):
        with Ssh(edge.url) as there, Shaping(there, "eth0", "10.98.0.2") as shaping:
            shaping.apply(parse_profile("up:rate=20mbit,delay=15ms;down:rate=40mbit,delay=25ms"))
            shaping.check()
            said = edge.execute("ping", "-q", "-i", "0.2", "-c", "5", "10.98.0.2")
            print(said.splitlines()[-1])
            assert float(said.rpartition("= ")[2].split("/")[0]) >= 40  # ms
            assert not lost or edge.sever()
            if lost:
                assert wait_for(lambda: state(edge) == before)
        assert wait_for(lambda: state(edge) == before and not helpers(edge))


#: A host that says by which port it listens, and of each of ten datagrams how long it took: both read one kernel's clock.
LISTENS = """\
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 0)); s.settimeout(20); print(s.getsockname()[1], flush=True)
    for _ in range(10): print(-float(s.recv(99)) + time.monotonic(), flush=True)
"""
SENDS = """\
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    for _ in range(10): s.sendto(str(time.monotonic()).encode(), (sys.argv[1], int(sys.argv[2]))); time.sleep(0.05)
"""


def one_way_s(sender: Host, receiver: Host, address: str) -> float:
    """The least time that a datagram took."""
    inside = ["nsenter", f"--target={receiver.pid}", "--net", "python3", "-c", LISTENS]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as listening:
        assert listening.stdout is not None
        sender.execute("python3", "-c", SENDS, address, listening.stdout.readline().strip())
        return min(map(float, listening.stdout.readlines()))


@pytest.mark.netem
@pytest.mark.parametrize(("shaped", "peer", "egress"), [("edge", 2, "up"), ("cloud", 1, "down")])
def test_either_host_shapes_both_ways_one_as_packets_leave_and_one_as_they_come(
    hosts: dict[str, Host], shaped: str, peer: int, egress: Way
) -> None:
    before = {name: state(host) for name, host in hosts.items()}

    def ways() -> tuple[float, float]:
        edge, cloud = hosts["edge"], hosts["cloud"]
        return one_way_s(edge, cloud, "10.98.0.2"), one_way_s(cloud, edge, "10.98.0.1")

    with Ssh(hosts[shaped].url) as there, Shaping(there, "eth0", f"10.98.0.{peer}", egress) as shaping:
        shaping.apply(parse_profile("up:delay=20ms;down:delay=60ms"))
        up, down = ways()
        counted = shaping.counters()
        shaping.check()
    print(f"{shaped}: {1e3 * up:.1f} ms up, {1e3 * down:.1f} down; {counted}")
    assert up >= 0.02 and down >= 0.06 and up < down
    assert all(counted[way].packets >= 10 for way in ("up", "down"))
    assert wait_for(lambda: {name: state(host) for name, host in hosts.items()} == before)


def test_without_that_line_it_is_refused_with_what_it_takes() -> None:
    with (
        bench("edge", "cloud", sudoers="root ALL=(ALL:ALL) ALL\n") as hosts,
        cable(hosts["edge"], hosts["cloud"]),
        Ssh(hosts["edge"].url) as there,
        pytest.raises(UsageError, match="takes root there, or sudo without a password"),
        Shaping(there, "eth0", "10.98.0.2"),
    ):
        pass
