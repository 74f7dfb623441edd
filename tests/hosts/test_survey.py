"""What a host is asked about itself: the program that answers needs no testbed there, and ends with who asks."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.hosts import asking, installing, survey
from testbed.hosts.local import Local

ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0
eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0
eth1 0000A8C0 FE0200C0 0003 0 0 0 0000FFFF 0 0 0
"""


def test_a_host_is_described_by_what_its_own_kernel_and_python_say() -> None:
    found = asking.asked(Local(), sys.executable, "survey", "pythons", "/nowhere/yet/")
    assert found["python"] == {"version": platform.python_version(), "executable": sys.executable}
    assert found["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["interfaces"]["lo"]["address"] == "127.0.0.1"
    assert found["testbed"]["digest"] == installing.digest()
    assert found["packages"]["msgspec"] and "pyyaml" in found["packages"]
    version, _ = found["pythons"][shutil.which("python3")]
    assert version[0] == 3
    assert found["room"]["/nowhere/yet/"] == pytest.approx(shutil.disk_usage("/").free, rel=0.2)


def test_a_python_without_the_testbed_answers_as_well() -> None:
    bare = str(Path(sys.base_prefix, "bin", "python3"))
    found = asking.asked(Local(), bare, "survey")
    assert found["testbed"] == {}
    assert "split-inference-testbed" not in found["packages"]


def test_an_old_python_can_read_the_program() -> None:
    ast.parse(Path(survey.__file__).read_text(), feature_version=(3, 8))


def test_a_changed_source_is_another_testbed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x = 1\n")
    before = survey.copy_of_testbed(str(tmp_path))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "c.py").write_text("no source of it")
    assert survey.copy_of_testbed(str(tmp_path)) == before
    (tmp_path / "a" / "b.py").write_text("x = 2\n")
    assert survey.copy_of_testbed(str(tmp_path))["digest"] != before["digest"]


def test_an_echo_is_reached_over_tcp_and_ends_with_who_asked() -> None:
    host = Local()
    with host.start(asking.program(sys.executable, "echo", "127.0.0.1"), {}) as process:
        port = asking.read(process, lambda data: b"\n" in data, Deadline(20), "the echo").decode().strip()
        found = asking.asked(host, sys.executable, "reach", "127.0.0.1", port)
        process.stdin.close()
        assert process.status(20) == 0
    assert found["exchanges"] == 20 and found["interface"] == "lo" and found["gateway"] == ""
    assert 0 < found["rtt_s"] <= found["rtt_median_s"]
    assert found["mtu"] > 1000
    again = asking.asked(host, sys.executable, "reach", "127.0.0.1", port)
    assert again == {"error": "Connection refused"}


@pytest.mark.parametrize(
    ("address", "through"), [("192.0.2.9", ""), ("192.168.7.1", "192.0.2.254"), ("8.8.8.8", "192.0.2.1")]
)
def test_the_longest_route_says_by_whom_packets_go(
    address: str, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_text", lambda _: ROUTES)
    assert survey.gateway(address) == through


def test_whoever_answers_nothing_or_forever_is_an_error_that_names_it() -> None:
    with pytest.raises(EndpointError, match="status 3"):
        asking.asked(_Ending(), "sh")
    with pytest.raises(EndpointError, match=r"the sleeper has not ended within 0\.5 s"):
        asking.run(Local(), ["sleep", "60"], 0.5, what="the sleeper")
    with pytest.raises(EndpointError, match="prints without end"):
        asking.run(Local(), ["yes"], 60, what="yes")


class _Ending(Local):
    """Whatever is started there ends by status 3."""

    def command(self, argv: object) -> list[str]:
        return super().command(["sh", "-c", "exit 3"])
