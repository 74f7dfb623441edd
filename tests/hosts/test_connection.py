"""A connection to a host: what it takes from ~/.ssh, whom it refuses; what stands in its way is one line with a remedy."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import EndpointError, SpecError, StorageError, TestbedError, UsageError
from testbed.hosts import connection, ssh
from testbed.hosts.address import parse_address
from testbed.hosts.asking import asked
from testbed.hosts.ssh import Ssh
from testbed.net.real.addresses import data_address
from testbed.net.topology.topology import Node
from tests.hosts import bench as benches
from tests.hosts.bench import OTHER_PYTHON, Host, bench, wait_for

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]
SMALL = 512 * 1024


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    banner = "Authorized use only.\nAll is logged.\n"
    with bench("edge", "cloud", banner=banner, home_size="512k", six=True) as made:
        yield made


@pytest.fixture
def edge(hosts: dict[str, Host]) -> Iterator[Host]:
    yield hosts["edge"]
    (hosts["edge"].home / ".bashrc").unlink(missing_ok=True)
    assert wait_for(lambda: not hosts["edge"].programs()), hosts["edge"].programs()
    assert set(hosts["edge"].files()) <= {".local", ".local/state"}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ~/.ssh of the test's own, as the bench made it."""
    home = tmp_path / "a home"
    shutil.copytree(Path("~/.ssh").expanduser(), home / ".ssh")
    monkeypatch.setenv("HOME", str(home))
    return home / ".ssh"


def said(call: object, kind: type[TestbedError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_host_is_refused_with_the_command_that_adds_it_and_stays_unknown(
    edge: Host, client: Path
) -> None:
    known = client / "known_hosts"
    before, _ = known.read_text(), known.write_text("")
    message = said(Ssh(edge.url).describe)
    assert f"{edge.url}: this host is not known: its key is ssh-ed25519 SHA256:" in message
    assert known.read_text() == ""
    command = re.search(r"ssh-keyscan .*", message)
    assert command is not None
    subprocess.run(["sh", "-c", command[0]], check=True, capture_output=True)
    assert Ssh(edge.url).run(["true"]) == (0, b"")
    assert before.split()[0] in known.read_text()


def test_a_host_whose_key_has_changed_is_refused_with_both_keys_and_what_forgets_the_old_one(
    hosts: dict[str, Host], edge: Host, client: Path
) -> None:
    known = client / "known_hosts"
    other = (hosts["cloud"].directory / "host_key.pub").read_text().split()[1]
    known.write_text(f"[{edge.address}]:{edge.port} ssh-ed25519 {other}\n")
    message = said(Ssh(edge.url).describe)
    assert "its host key has changed: SHA256:" in message and message.count("SHA256:") == 2
    command = re.search(r"ssh-keygen .*", message)
    assert command is not None
    subprocess.run(["sh", "-c", command[0]], check=True, capture_output=True)
    assert "this host is not known" in said(Ssh(edge.url).describe)


def test_lines_of_known_hosts_that_are_none_are_passed_over_and_any_of_its_keys_will_do(
    hosts: dict[str, Host], edge: Host, client: Path
) -> None:
    known = client / "known_hosts"
    theirs, other = (
        (host.directory / "host_key.pub").read_text().split()[1] for host in (edge, hosts["cloud"])
    )
    where = f"[{edge.address}]:{edge.port} ssh-ed25519"
    lines = ["x", f"{where} !!!!!", f"{where} AAAA", f"{where} {theirs[:-9]}", f"@revoked {where} {other}"]
    known.write_bytes(
        "\n".join([*lines, f"{where} {other}", f"{where} {theirs}\n"]).encode() + b"\xff\xfe x y\n"
    )
    with Ssh(edge.url) as there:
        assert there.run(["uname", "-n"]) == (0, b"tb-edge\n")


def test_a_host_is_reached_by_an_ipv6_address_and_made_known_by_it(edge: Host, client: Path) -> None:
    (client / "known_hosts").write_text("")
    url = f"ssh://{edge.user}@[{edge.six}]:{edge.port}"
    command = re.search(r"ssh-keyscan .*", said(Ssh(url).describe))
    assert command is not None
    subprocess.run(["sh", "-c", command[0]], check=True, capture_output=True)
    with Ssh(url) as there:
        assert there.addresses()[1] == edge.six
        found = asked(there, "/usr/bin/python3", "survey")
        node = Node("edge", parse_address(url))
        message = said(lambda: data_address(node, there, found), SpecError)
    assert f"is reached by SSH at {edge.six}; say by address: or interface:" in message


def test_a_user_whom_nobody_knows_is_told_what_to_set(edge: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert said(lambda: Ssh(edge.url)).endswith("knows no name of this user; set LOGNAME")
    monkeypatch.setenv("LOGNAME", "kim")
    with Ssh(edge.url) as there:
        assert there.run(["true"]) == (0, b"")
    monkeypatch.delenv("HOME")
    assert "there is no home directory" in said(lambda: Ssh(edge.url))


def test_a_key_that_the_host_does_not_take_is_one_line_with_what_would_give_it_to_it(
    edge: Host, client: Path
) -> None:
    for left in client.glob("id_*"):
        left.unlink()
    for make in (lambda: None, lambda: benches.make_key(client / "id_ed25519")):
        make()
        message = said(Ssh(edge.url).describe)
        assert "lets tb-edge in by none of the keys here; ssh-copy-id -p 2201 tb-edge@" in message


def test_a_key_with_a_passphrase_asks_for_an_agent(edge: Host, client: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(client / "id_ed25519")], check=True
    )
    assert "the key has a passphrase: ssh-add" in said(Ssh(edge.url).describe)


def test_an_agents_keys_are_tried(edge: Host, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket_of_it = client / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(socket_of_it)], stdout=subprocess.DEVNULL) as agent:
        try:
            assert wait_for(socket_of_it.exists)
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_of_it))
            subprocess.run(["ssh-add", str(client / "id_ed25519")], check=True, capture_output=True)
            (client / "id_ed25519").unlink()
            with Ssh(edge.url) as there:
                assert there.run(["uname", "-n"]) == (0, b"tb-edge\n")
        finally:
            agent.kill()


def test_who_is_not_let_in_as_that_user_is_told_so(edge: Host) -> None:
    assert "lets nobody-here in by none" in said(Ssh(edge.url.replace("tb-edge", "nobody-here")).describe)


def test_a_host_that_is_not_there_is_one_line(edge: Host) -> None:
    assert "not reached at" in said(Ssh(f"ssh://x@{edge.address}:9").describe, EndpointError)
    for name in ("no.such.invalid", "n" * 70):
        assert f"no host {name} is known to the resolver" in said(Ssh(f"ssh://x@{name}").describe)
    with socket.create_server((edge.address.rpartition(".")[0] + ".1", 0)) as mute:
        mute.listen()
        where = mute.getsockname()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("testbed.hosts.connection._CONNECT_S", 0.5)
            message = said(Ssh(f"ssh://x@{where[0]}:{where[1]}").describe, EndpointError)
    assert message.startswith(f"ssh://x@{where[0]}:{where[1]}: ")


def test_the_configuration_gives_name_user_port_key_and_known_hosts(edge: Host, client: Path) -> None:
    for name in ("id_ed25519", "known_hosts"):
        (client / name).rename(client / f"own_{name}")
    (client / "config").write_text(
        f"Host there\n  HostName {edge.address}\n  User {edge.user}\n  Port {edge.port}\n"
        "  IdentityFile ~/.ssh/own_id_ed25519\n  IdentitiesOnly Yes\n  UserKnownHostsFile ~/.ssh/own_known_hosts\n"
    )
    with Ssh("ssh://there") as there:
        assert there.run(["uname", "-n"]) == (0, b"tb-edge\n")
    (client / "config").rename(client / "more.config")
    (client / "config").write_text("Include *.config\nHost other\n  User nobody\n")
    with Ssh("ssh://there") as there:
        assert there.run(["uname", "-n"]) == (0, b"tb-edge\n")
    assert "lets x in by none" in said(Ssh("ssh://x@there").describe)  # what an address says comes first


def test_the_configuration_is_read_as_ssh_reads_it(client: Path) -> None:
    (client / "more.config").write_text("Host there\n\tUser\tkim # not lab\n")
    (client / "config").write_text("Include\tmore.config # all of them\n")
    assert connection.where("ssh://there").user == "kim"
    assert connection.where("ssh://other").user != "kim"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("Port many", "many"),
        ("Port 70000", "no port 70000"),
        ("Match localnetwork 192.0.2.0/24", "Match localnetwork is not understood"),
        ("Match host there tagged lab", "Match tagged is not understood"),
    ],
)
def test_a_configuration_that_is_not_understood_is_one_line(client: Path, line: str, why: str) -> None:
    (client / "config").write_text(f"{line}\n  User lab\n")
    assert re.search(f"config cannot be read: .*{why}", said(lambda: Ssh("ssh://there")))


def test_a_host_behind_another_is_reached_through_it(edge: Host, client: Path) -> None:
    (client / "config").write_text(
        f"Host way\n  HostName {edge.address}\n  User {edge.user}\n  Port {edge.port}\n"
        f"Host behind\n  HostName {edge.address}\n  User {edge.user}\n  Port {edge.port}\n  ProxyJump way\n"
    )
    with Ssh("ssh://behind") as there:
        status, printed = there.run(["sh", "-c", "echo $SSH_CONNECTION"])
        assert (there.first_hop(), there.addresses()) == (edge.address, ("", ""))
    assert status == 0 and printed.split()[0] == edge.address.encode()  # from the host itself
    (client / "known_hosts").write_text((client / "known_hosts").read_text().replace(f":{edge.port}", ":1"))
    assert "this host is not known" in said(Ssh("ssh://way").describe)
    config = (client / "config").read_text()
    (client / "config").write_text(config.replace("ProxyJump way", "HostKeyAlias other"))
    assert said(Ssh("ssh://behind").describe).endswith("say so to  ssh ssh://behind true")
    (client / "config").write_text("Host round\n  HostName 198.19.0.1\n  ProxyJump round\n")
    assert "more than 8 hosts on the way" in said(Ssh("ssh://round").describe)


def test_an_address_that_is_none_is_refused() -> None:
    for text in ("http://a", "ssh://", "ssh://a:0", "ssh://a b", "ssh://a:70000"):
        assert "ssh://[user@]name[:port]" in said(lambda text=text: Ssh(text))


def test_a_login_shell_that_prints_or_goes_elsewhere_disturbs_neither_programs_nor_files(
    edge: Host, tmp_path: Path
) -> None:
    noise = "cd /tmp; echo welcome; echo warning >&2; head -c 30000 /dev/urandom\n"
    (edge.home / ".bashrc").write_text(noise)
    here, again = tmp_path / "here", tmp_path / "again"
    here.write_bytes(b"data" * 10_000)
    with Ssh(edge.url) as there:
        assert there.run(["cat"], b"said") == (0, b"said")
        there.put(here, Path("there"))
        there.get(Path("~/there"), again)
        assert there.run(["pwd"]) == (0, b"/home/tb-edge\n")
        assert abs(there.clock()[0]) < 1
    assert again.read_bytes() == here.read_bytes()
    (edge.home / "there").unlink()


@pytest.mark.parametrize("shell", ["dash", "fish", "tcsh"])
def test_any_login_shell_will_do(edge: Host, tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    passwd = edge.directory / "passwd"
    before = passwd.read_text()
    passwd.write_text(before.replace(f"/home/{edge.user}:/bin/bash", f"/home/{edge.user}:{program}"))
    here, again = tmp_path / "here", tmp_path / "again"
    here.write_bytes(b"data" * 10_000)
    words = ["$HOME", "~", "a  b", "!1", "'", '"', "\\n", "*", "{a,b}", "ü"]
    try:
        with Ssh(edge.url) as there:
            assert (
                there.run(["sh", "-c", "tr '\\0' '\\n' </proc/$PPID/environ"])[1].count(
                    f"SHELL={program}".encode()
                )
                == 1
            )
            assert there.run(["printf", "%s\\n", *words], b"") == (0, "\n".join([*words, ""]).encode())
            there.put(here, Path("~/there"))
            there.get(Path("~/there"), again)
            assert asked(there, "/usr/bin/python3", "survey")["home"] == f"/home/{edge.user}"
            assert there.clean() == []
        assert again.read_bytes() == here.read_bytes()
        message = said(Ssh(edge.url, "~/no/python").describe, EndpointError)
        assert "no ~/no/python there that runs" in message
        # A home's Python is found by the shell's own ~.
        (edge.home / "a b").symlink_to("/usr/bin/python3")
        with Ssh(edge.url, "~/a b") as there:
            assert there.run(["true"]) == (0, b"")
    finally:
        passwd.write_text(before)
        for left in ("a b", "there"):
            (edge.home / left).unlink(missing_ok=True)
        shutil.rmtree(edge.home / ".config", ignore_errors=True)
        shutil.rmtree(edge.home / ".local/share", ignore_errors=True)


def test_a_login_shell_that_ends_prints_on_or_waits_is_one_line(
    edge: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "_ANSWER_S", 2.0)
    there = Ssh(edge.url)
    for script, message in (
        (
            "echo closed for today; exit 3",
            "its login shell ended with status 3 before python3 ran: closed for today",
        ),
        ("yes no", "its login shell prints without end: "),
        ("sleep 5", "no answer within 2 s"),
    ):
        (edge.home / ".bashrc").write_text(script + "\n")
        assert message in said(there.describe, EndpointError)
    there.close()
    assert wait_for(lambda: not edge.programs())


def test_a_host_without_that_python_or_without_a_testbed_says_what_installs_it(edge: Host) -> None:
    message = said(Ssh(edge.url, "~/no/python").describe, EndpointError)
    assert "no ~/no/python there that runs" in message and "testbed hosts install" in message
    with (
        Ssh(edge.url, "/usr/bin/python3") as there,
        there.start(there.module("testbed.endpoints.cloud"), {}) as process,
    ):
        assert process.status(20) == 1
        assert "testbed hosts install TOPOLOGY puts it there" in process.last_words()


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ('sys.version_info = (3, 6, 9); sys.version = "3.6.9 (a Jetson)"', "its ~/python is Python 3.6.9, and"),
        ('sys.platform = "darwin"; platform.system = lambda: "Darwin"', "it runs Darwin, and a host has to run Linux"),
    ],
)  # fmt: skip
def test_a_python_or_system_that_is_too_far_from_ours_is_named(edge: Host, shown: str, message: str) -> None:
    script = edge.home / "python"
    script.write_text(OTHER_PYTHON.format(shown=shown))
    script.chmod(0o755)
    with Ssh(edge.url, "~/python") as there:
        for call in (there.describe, there.clean, lambda: there.start(["true"], {})):
            assert message in said(call, EndpointError)
    script.unlink()


def test_what_a_hosts_environment_says_of_modules_is_no_part_of_a_program_of_ours(edge: Host) -> None:
    (edge.home / ".bashrc").write_text("export PYTHONPATH=$HOME/old\n")
    (edge.home / "old/testbed").mkdir(parents=True)
    (edge.home / "old/testbed/__init__.py").write_text("raise SystemExit('an old one')\n")
    try:
        with Ssh(edge.url, sys.executable) as there:
            assert there.run(there.module("testbed", "--version"))[0] == 0
    finally:
        shutil.rmtree(edge.home / "old")


def test_a_user_without_a_home_there_is_one_line(edge: Host) -> None:
    passwd = edge.directory / "passwd"
    before = passwd.read_text()
    passwd.write_text(before.replace(f"/home/{edge.user}:", "/nowhere:"))
    try:
        with Ssh(edge.url) as there:
            assert there.describe()["hostname"] == "tb-edge"
            message = said(lambda: there.start(["true"], {}), EndpointError)
            assert "cannot start true: Permission denied: /nowhere/.local/state/testbed/processes/" in message
            assert there.clean(sent=True) == []
    finally:
        passwd.write_text(before)


def test_a_state_directory_that_is_not_ours_to_read_is_one_line(edge: Host) -> None:
    state = edge.home / ".local/state"
    shutil.rmtree(edge.home / ".local", ignore_errors=True)
    state.mkdir(mode=0o700, parents=True)  # root's
    try:
        with Ssh(edge.url) as there:
            assert there.clean(sent=True) == []
            message = said(lambda: there.start(["true"], {}), EndpointError)
            assert "cannot start true: Permission denied: /home/tb-edge/.local/state/testbed" in message
    finally:
        shutil.rmtree(edge.home / ".local")


def test_a_full_disk_there_is_one_line_and_leaves_nothing(edge: Host, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_bytes(bytes(2 * SMALL))
    with Ssh(edge.url) as there:
        message = said(lambda: there.put(here, Path("~/there")), StorageError)
        assert "No space left on device: /home/tb-edge/there; make room there" in message
        assert edge.files() == [".local", ".local/state"]
        filler = edge.home / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        message = said(lambda: there.start(["sleep", "100"], {}), EndpointError)
        assert "cannot start sleep: No space left on device" in message and "make room there" in message
        assert there.clean() == []
        filler.unlink()
