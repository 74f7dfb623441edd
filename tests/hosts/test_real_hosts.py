"""`testbed hosts` against hosts of our own with an SSH server each: docs/hosts.md followed as it is written there, and what goes
wrong on the way. Between edge and cloud lies an emulated link; SSH comes by another way."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.hosts import installing
from testbed.hosts.ssh import Ssh
from testbed.models.sources import model_directory
from testbed.net.fabric.fabric import Fabric
from testbed.net.topology.files import load_topology
from tests.command import Ended, command
from tests.conftest import MODEL
from tests.hosts.bench import OTHER_PYTHON, Host, bench, missing
from tests.runs import rows

pytestmark = [
    pytest.mark.netns,
    pytest.mark.usefixtures("own_state"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
PYTHON = "~/testbed/.venv/bin/python"
FETCHED = model_directory(MODEL)  # as it is before a bench has another home
OURS = ("split_inference_testbed", "__editable__", "__pycache__")


@pytest.fixture(scope="module")
def packages() -> Iterator[Path]:
    """All that the testbed needs, and no testbed, for everybody to see."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for place in (Path(path) for path in sys.path if Path(path).name == "site-packages"):
            for entry in place.iterdir():
                ours = entry.name.startswith(OURS) or entry.name.endswith(".pth")
                if not ours and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
        yield folder


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    with (
        pytest.MonkeyPatch.context() as patch,
        Fabric.build(load_topology("edge-cloud"), "userspace") as fabric,
    ):
        patch.setenv("PYTHONPATH", "")
        with bench({node: fabric.namespace(node) for node in ("edge", "cloud")}) as made:
            yield made


def equip(host: Host, packages: Path) -> None:
    """An environment that the host's user made, in which there is everything but the testbed."""
    with Ssh(host.url) as there:
        status, _ = there.run([f"{sys.base_prefix}/bin/python3", "-m", "venv", "testbed/.venv"], within_s=120)
    assert status == 0
    (folder,) = host.home.glob("testbed/.venv/lib/python*/site-packages")
    (folder / "theirs.pth").write_text(f"{packages}\n")


def topology(folder: Path, **nodes: str) -> str:
    lines = [f"  {name}: {{{text}}}" for name, text in nodes.items()]
    path = folder / "hosts.yaml"
    path.write_text(
        "\n".join(["nodes:", *lines, "links:", "  - {name: access, a: edge, b: cloud, profile: measured}\n"])
    )
    return str(path)


def both(hosts: dict[str, Host], folder: Path, python: str = PYTHON, more: str = "interface: eth0") -> str:
    return topology(
        folder, **{name: f"host: '{host.url}', python: {python}, {more}" for name, host in hosts.items()}
    )


def left(host: Host) -> list[str]:
    """What lies in the user's home there, without what is in the environment; and what runs there for longer than a program may
    take to leave."""
    until = time.monotonic() + 8
    while (running := host.programs()) and time.monotonic() < until:
        time.sleep(0.1)
    files = [file for file in host.files() if not file.startswith((".local", ".cache", "testbed/"))]
    return files + [" ".join(words) for words in running.values()]


def line(said: Ended, *begins: str) -> str:
    (found,) = (line for line in said.out.splitlines() if line.split()[: len(begins)] == [*begins])
    return found


def test_hosts_without_a_testbed_are_looked_at_all_the_same(hosts: dict[str, Host], tmp_path: Path) -> None:
    said = command("hosts", both(hosts, tmp_path, "~/none/bin/python"))
    assert said.status == 1
    assert "testbed hosts install" in line(said, "edge", "python")
    assert "MISSING  not installed" in line(said, "cloud", "testbed")
    assert re.search(r"10\.0\.0\.2 on eth0, MTU \d+$", line(said, "cloud", "network"))
    assert "from 10.0.0.1 on eth0" in line(said, "access", "edge", "to", "cloud")
    assert [left(host) for host in hosts.values()] == [[], []]


def test_what_ssh_resolves_to_is_where_data_arrives_unless_the_topology_says_otherwise(
    hosts: dict[str, Host], tmp_path: Path
) -> None:
    said = command("hosts", both(hosts, tmp_path, "python3", "device: cpu"))
    address = hosts["cloud"].address
    assert f"{address} on mgmt0" in line(said, "cloud", "network")
    assert "SSH comes by it, too" in line(said, "cloud", "network")
    assert f"{address}: " in line(said, "access", "edge", "to", "cloud")  # no way from one to the other


def test_an_address_that_an_interface_has_besides_another_and_a_python_where_nobody_may_look(
    hosts: dict[str, Host], tmp_path: Path
) -> None:
    edge, cloud = hosts["edge"], hosts["cloud"]
    cloud.execute("ip", "addr", "add", "10.0.0.77/24", "dev", "eth0")
    edge.execute("mkdir", "-m", "700", "/home/closed")
    try:
        path = topology(
            tmp_path,
            edge=f"host: '{edge.url}', python: /home/closed/venv/bin/python, interface: eth0",
            cloud=f"host: '{cloud.url}', address: 10.0.0.77",
        )
        said = command("hosts", path)
    finally:
        cloud.execute("ip", "addr", "del", "10.0.0.77/24", "dev", "eth0")
        edge.execute("rmdir", "/home/closed")
    assert "10.0.0.77 on eth0" in line(said, "cloud", "network")
    assert "no /home/closed/venv/bin/python there that runs" in line(said, "edge", "python")
    assert "free" in line(said, "edge", "memory")


@pytest.mark.slow
def test_install_puts_this_very_testbed_on_both_hosts_which_can_then_run(
    hosts: dict[str, Host], packages: Path, tmp_path: Path
) -> None:
    for host in hosts.values():
        equip(host, packages)
    path = both(hosts, tmp_path)
    with _an_old_python(hosts["edge"]):  # which is not asked, where its user made an environment with another
        _installed(hosts, path)


def _installed(hosts: dict[str, Host], path: str) -> None:
    done = command("hosts", "install", path, "--offline")
    assert done.status == 0, done
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == ["edge", "cloud"]
    said = command("hosts", path, "--json")
    assert said.status == 0, said
    found: dict[str, Any] = json.loads(said.out)
    for name, host in hosts.items():
        survey = found["nodes"][name]["survey"]
        assert survey["testbed"]["digest"] == installing.digest()
        assert survey["testbed"]["path"].startswith(f"/home/{host.user}/testbed/.venv/")
        assert survey["ssh_address"] == host.address
        assert left(host) == ["testbed"]
    there, _ = found["paths"]
    link = load_topology("edge-cloud").links[0].profile
    assert there["rtt_s"] > link.up.delay_s  # by the emulated link, and not by the way of SSH
    assert there["source"] == "10.0.0.1" and there["interface"] == "eth0"
    assert command("clean", path).out == "nothing to remove\n"


@contextlib.contextmanager
def _an_old_python(host: Host) -> Iterator[None]:
    """By the name of python3, as a Jetson's."""
    place = host.home / ".local/old"
    place.mkdir(parents=True)
    (place / "python3").write_text(
        OTHER_PYTHON.format(shown='sys.version_info = (3, 6, 9); sys.version = "3.6.9 "')
    )
    (place / "python3").chmod(0o755)
    (host.home / ".bashrc").write_text("PATH=$HOME/.local/old:$PATH\n")
    try:
        yield
    finally:
        (host.home / ".bashrc").unlink()


def test_a_host_that_is_not_there_is_one_line_and_the_other_is_looked_at(
    hosts: dict[str, Host], tmp_path: Path
) -> None:
    edge, cloud = hosts["edge"], hosts["cloud"]
    nobody = f"ssh://{cloud.user}@{cloud.address}:1"
    path = topology(tmp_path, edge=f"host: '{edge.url}'", cloud=f"host: '{nobody}', python: {PYTHON}")
    said = command("hosts", path)
    assert said.status == 1
    assert "MISSING  " in line(said, "cloud", "reached") and nobody in line(said, "cloud", "reached")
    assert "3." in line(said, "edge", "python")
    for arguments in (("hosts", "install", path), ("clean", path)):
        done = command(*arguments)
        assert done.status == 1
        assert [text for text in done.errors.splitlines() if nobody in text]


def test_a_cloud_vm_is_reached_past_a_bastion_and_what_stands_in_the_datas_way_is_named(
    hosts: dict[str, Host], tmp_path: Path
) -> None:
    edge, cloud = hosts["edge"], hosts["cloud"]
    config = Path(os.environ["HOME"], ".ssh/config")
    where = f"  HostName {cloud.address}\n  Port {cloud.port}\n  User {cloud.user}\n"
    config.write_text(f"Host bastion\n{where}Host vm\n{where}  ProxyJump bastion\n")
    path = topology(
        tmp_path, edge=f"host: '{edge.url}', interface: eth0", cloud="host: ssh://vm, interface: eth0"
    )
    try:
        assert "from 10.0.0.1 on eth0" in line(command("hosts", path), "access", "edge", "to", "cloud")
        _known_to_itself_alone(cloud, "vm.internal", config)
        inside = topology(tmp_path, edge=f"host: '{edge.url}', interface: eth0", cloud="host: ssh://vm")
        assert f"{cloud.address} on mgmt0" in line(command("hosts", inside), "cloud", "network")
        path = topology(
            tmp_path, edge=f"host: '{edge.url}', interface: eth0", cloud="host: ssh://vm, interface: eth0"
        )
        cloud.execute("ip", "route", "add", "blackhole", "10.0.0.1/32")  # as a firewall that drops
        closed = line(command("hosts", path), "access", "edge", "to", "cloud")
        assert "MISSING" in closed and "does a firewall let TCP through?" in closed
    finally:
        config.unlink()
        cloud.execute("ip", "route", "flush", "type", "blackhole")


def _known_to_itself_alone(host: Host, name: str, config: Path) -> None:
    """A name of a host's network, which nobody resolves outside of it."""
    names = host.directory / "names"
    names.write_text(f"{host.address} {name}\n")
    host.execute("mount", "--bind", str(names), "/etc/hosts")
    last = config.read_text().rpartition(host.address)
    alias = f"\n  HostKeyAlias [{host.address}]:{host.port}"
    config.write_text(f"{last[0]}{name}{alias}{last[2]}")


def test_a_host_behind_address_translation_is_told_that_it_cannot_listen_where_ssh_reaches_it(
    hosts: dict[str, Host], tmp_path: Path
) -> None:
    edge, cloud = hosts["edge"], hosts["cloud"]
    outside = str(ipaddress.ip_address(cloud.address) - 1)
    with _forwarded(outside, cloud) as port:
        known = Path(os.environ["HOME"], ".ssh/known_hosts")
        before = known.read_text()
        known.write_text(before.replace(f"[{cloud.address}]:{cloud.port}", f"[{outside}]:{port}"))
        there = f"host: 'ssh://{cloud.user}@{outside}:{port}', python: python3"
        path = topology(tmp_path, edge=f"host: '{edge.url}', interface: eth0", cloud=there)
        said = command("hosts", path)
        known.write_text(before)
    told = f"SSH reaches it at {outside}, which is no address of it, so it cannot listen there"
    assert told in line(said, "cloud", "network") and told in line(said, "access", "edge", "to", "cloud")


@contextlib.contextmanager
def _forwarded(address: str, host: Host) -> Iterator[int]:
    """A port of ours that leads to a host's sshd, as a router does that translates addresses."""
    with socket.create_server((address, 0)) as listening:

        def forward() -> None:
            with contextlib.suppress(OSError):
                while True:
                    outer = listening.accept()[0]
                    inner = socket.create_connection((host.address, host.port))
                    for a, b in ((outer, inner), (inner, outer)):
                        threading.Thread(target=_copy, args=(a, b), daemon=True).start()

        threading.Thread(target=forward, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def _copy(a: socket.socket, b: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := a.recv(1 << 16):
            b.sendall(piece)
        b.shutdown(socket.SHUT_WR)


def test_a_system_python_is_no_environment_to_install_into(hosts: dict[str, Host], tmp_path: Path) -> None:
    done = command("hosts", "install", both(hosts, tmp_path, "python3"))
    assert done.status == 1
    assert len(done.errors.splitlines()) == 2
    assert all("python: python3 is in none" in text for text in done.errors.splitlines())


@pytest.mark.slow
@pytest.mark.model
def test_two_laptops_work_as_the_page_has_it(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (section,) = re.findall(r"(?ms)^## Two laptops$(.*?)^## ", PAGE.read_text())
    (written,) = re.findall(r"(?ms)^```yaml$(.*?)^```$", section)
    lines = [shlex.split(text, comments=True) for text in re.findall(r"(?m)^    (\S.*)$", section)]
    assert [words[:2] for words in lines if words[0] == "testbed"] == [
        ["testbed", word] for word in ("hosts", "hosts", "models", "calibrate", "run", "clean")
    ]
    with tempfile.TemporaryDirectory(dir="/tmp") as models, bench("laptop") as made:
        shutil.copytree(FETCHED, Path(models, "models", MODEL))
        host = made["laptop"]
        equip(host, packages)
        _show_the_model(host, Path(models))
        monkeypatch.setenv("TESTBED_CACHE", models)
        monkeypatch.setenv("PYTHONPATH", "")
        monkeypatch.chdir(tmp_path)
        settings = _as_the_page_calls_it(host)
        ours = written.replace("kim@", f"{host.user}@").replace("wlan0", _interface_to(host.address))
        Path("laptops.yaml").write_text(ours)
        for words in lines:
            if words[0] == "testbed":
                done = command(
                    *words[1:], *(["--offline"] if "install" in words else [])
                )  # it has no network
                assert done.status == 0, (words, done)
            elif words[0] == "ssh":  # keys are there already, and nobody is called kim
                assert words[1] == "kim@laptop"
                subprocess.run(["ssh", "-F", settings, "laptop", *words[2:]], check=True, timeout=120)
        assert left(host) == ["testbed"]
    (directory,) = Path("results").glob("quick-*")
    found = rows(directory)
    assert found and not [row["error"] for row in found if row["error"]]
    assert {row["emulator"] for row in found if row["placement"] != "edge"} == {"real"}


def _show_the_model(host: Host, folder: Path) -> None:
    """The host has no network to fetch a model by."""
    folder.chmod(0o777)
    host.execute("mkdir", "-m", "777", f"/home/{host.user}/.cache")
    host.execute("ln", "-s", str(folder), f"/home/{host.user}/.cache/testbed")


def _as_the_page_calls_it(host: Host) -> Path:
    """The host by the name `laptop`, as ~/.ssh/config may have it."""
    folder = Path(os.environ["HOME"], ".ssh")
    config = folder / "config"
    config.write_text(
        f"Host laptop\n  HostName {host.address}\n  Port {host.port}\n  User {host.user}\n"
        f"  IdentityFile {folder}/id_ed25519\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    return config


def _interface_to(address: str) -> str:
    said = subprocess.run(["ip", "-j", "route", "get", address], check=True, capture_output=True).stdout
    return str(json.loads(said)[0]["dev"])
