"""What a host is asked of its clock, what is left of an installation that was cut off, and a path of small packets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from testbed.errors import EndpointError, TestbedError
from testbed.hosts import installing
from testbed.hosts.address import parse_address
from testbed.hosts.installing import Installation
from testbed.hosts.ssh import Ssh
from testbed.net.profile.profile import MEASURED
from testbed.net.real import measuring
from testbed.net.real.measuring import End
from testbed.net.real.real import Real
from testbed.net.topology.topology import Link, Node, Topology
from tests.hosts import bench as benches
from tests.hosts.bench import Host, bench, cable

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]
#: As chrony 4.3 prints it.
CHRONYC = """\
#!/bin/sh
[ "$*" = "-n tracking" ] || exit 1
cat <<'END'
Reference ID    : 50484330 (PHC0)
Stratum         : 1
Ref time (UTC)  : Fri Nov 27 20:00:00 2026
System time     : 0.000000013 seconds fast of NTP time
Last offset     : -0.000000021 seconds
Root dispersion : 0.000001042 seconds
Leap status     : Normal
END
"""
#: In its mount namespace, a /dev with two PTP clocks, and all else that was there.
DEV = """\
mkdir /run/dev && mount --rbind /dev /run/dev && mount -t tmpfs none /dev
for each in /run/dev/*; do ln -s "$each" /dev/; done
: >/dev/ptp0; : >/dev/ptp1; : >/dev/ptp_kvm
"""


def test_what_keeps_a_hosts_clock_right_is_told_and_on_record(edge: Host, there: Ssh) -> None:
    edge.execute("sh", "-c", DEV)
    (edge.home / "bin").mkdir()
    for name, program in (("chronyc", CHRONYC.encode()), ("ptp4l", Path("/bin/sleep").read_bytes())):
        (edge.home / "bin" / name).write_bytes(program)
        (edge.home / "bin" / name).chmod(0o755)
    (edge.home / ".bashrc").write_text("PATH=$HOME/bin:$PATH\n")
    address = parse_address(edge.url)
    nodes = tuple(Node(name, address, sys.executable, address="127.0.0.1") for name in ("edge", "cloud"))
    try:
        with (
            there.start(["ptp4l", "100"], {}),
            Real.open(Topology("real", nodes, (Link("access", "edge", "cloud", MEASURED),))) as real,
        ):
            told = real.described()["edge"]["clock"]
    finally:
        edge.execute("sh", "-c", f"cd /home/{edge.user} && rm -r bin .bashrc")
    assert told["ptp"] == ["/dev/ptp0", "/dev/ptp1"] and "ptp4l" in told["running"]
    assert told["chrony"]["Reference ID"] == "50484330 (PHC0)"
    assert told["chrony"]["System time"] == "0.000000013 seconds fast of NTP time"


def test_wheels_that_a_lost_connection_left_there_are_cleaned(
    there: Ssh, edge: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise EndpointError("the connection was lost")

    (tmp_path / "constraints.txt").write_text("")
    (tmp_path / "a.whl").write_bytes(b"no wheel")
    files = [tmp_path / "constraints.txt", tmp_path / "a.whl"]
    installation = Installation(there, "edge", "/usr/bin/python3", print)
    with pytest.raises(TestbedError):
        installation._put_and_install("/usr/bin/python3", files, True)
    assert ".cache/testbed" in edge.files() and ".cache/testbed/sent" not in edge.files()
    monkeypatch.setattr(Installation, "_remove", lost)
    with pytest.raises(TestbedError):
        installation._put_and_install("/usr/bin/python3", files, True)
    assert any(name.endswith("/a.whl") for name in edge.files())
    (line,) = there.clean(sent=True)
    assert line == f"{edge.url}: removed {installing_folder(edge)}, which was sent there for runs"
    there.run(["rmdir", ".cache/testbed", ".cache"])


def installing_folder(host: Host) -> str:
    assert ".cache/testbed/sent" in installing._FOLDER
    return f"/home/{host.user}/.cache/testbed/sent"


@pytest.mark.parametrize("told", [True, False])
def test_a_path_of_small_packets_is_measured_by_such_or_by_pieces_of_larger_ones(told: bool) -> None:
    """By each of both ends' interfaces, or where nobody but the path knows of it."""
    with (
        bench("edge", "cloud") as hosts,
        cable(hosts["edge"], hosts["cloud"]),
        Ssh(hosts["edge"].url, sys.executable) as a,
        Ssh(hosts["cloud"].url, sys.executable) as b,
    ):
        if told:
            _make_small(hosts)
        ends = End("edge", a, "10.98.0.1"), End("cloud", b, "10.98.0.2")
        with measuring._probing(*ends) as (prober, size):
            assert size == (1280 if told else 1500)
            if not told:
                _make_small(hosts)
            # So many that they are sent together.
            arrived = prober.run({"up": measuring._flow(1e9, 0.1, size)}, 0.3)["up"]
            assert len(arrived.numbers) > 10


def _make_small(hosts: dict[str, Host]) -> None:
    for host in hosts.values():
        host.execute("ip", "link", "set", "eth0", "mtu", "1280")
