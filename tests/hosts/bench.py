"""Hosts of one's own, for tests: namespaces with an sshd each, a user that the machine does not know, and a way to it that is
apart from what a `Fabric` laid between them.

    with bench("edge", "cloud") as hosts:                      # namespaces of their own, or those of a fabric:
    with bench({"edge": fabric.namespace("edge"), "cloud": fabric.namespace("cloud")}) as hosts:
        hosts["edge"].url                                      # ssh://tb-edge@198.19.7.2:2201, as a topology's `host:` is
        Ssh(hosts["edge"].url).run(["uname", "-n"])            # (0, b"tb-edge\\n")

`bench` sets HOME for the block: that of the client, with its key, its known hosts and its ``.ssh/config``. So a `testbed` that
is started in the block reaches the hosts, too. Programs on a host see an own /etc/passwd, /home, /run and host name; from here
their home is `Host.home`. The Python of this test and the checkout are to be seen there even where /root is closed;
`shown` names more such paths (a directory of models below a `tmp_path`, say). Whatever runs there ends with the block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SSHD = "/usr/sbin/sshd"
_CHECKOUT = Path(__file__).parents[2]
_CONFIG = """\
Port {port}
ListenAddress {address}
HostKey {key}
AuthorizedKeysFile .ssh/authorized_keys /run/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
MaxStartups 100
Banner {banner}
{six}
Subsystem sftp internal-sftp
"""
#: A script that says that it is Python 3.10, where it is asked what it is.
OLD_PYTHON = """\
#!/bin/sh
[ "$1 $2" = "-I -c" ] || exec {python} "$@"
shift 2
exec {python} -I -c 'import platform, sys; platform.python_version = lambda: "3.10.12"; asked = sys.argv.pop(1)
exec(compile(asked, "survey", "exec"), {{"__name__": "__main__"}})' "$@"
"""
#: A script that runs a program of that Python as another one would see itself.
OTHER_PYTHON = """\
#!/bin/sh
[ "$2" = -S ] || exec /usr/bin/python3 "$@"
exec /usr/bin/python3 -I -S -c 'import platform, sys; {shown}; exec(sys.argv[1])' "$4"
"""
#: In a mount, host name and network namespace of its own; $0: the host's directory, $1: its name, $2: its home's size.
_FURNISH = """\
set -e
hostname "$1"
mkdir -p "$0/shown"
for path in {shown}; do
    mkdir -p "$0/shown$path" && mount --bind "$path" "$0/shown$path"
done
for closed in {closed}; do mount -t tmpfs -o mode=755 none "$closed"; done
for path in {shown}; do mkdir -p "$path"; mount --bind "$0/shown$path" "$path"; done
mount --bind "$0/passwd" /etc/passwd
mount --bind "$0/shadow" /etc/shadow
[ ! -e "$0/sudoers" ] || mount --bind "$0/sudoers" /etc/sudoers
mount -t tmpfs -o mode=755,size="$2" none /home
mkdir -p "/home/$1/.ssh"
cp "$0/authorized_keys" "/home/$1/.ssh/"
chown -R {uid}:{uid} "/home/$1"
chmod 700 "/home/$1/.ssh"
mount -t tmpfs -o mode=755 none /run
mkdir /run/sshd
cp "$0/authorized_keys" /run/
exec {sshd} -D -e -f "$0/sshd_config"
"""


def missing() -> str:
    """Why there can be no bench here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    return "" if Path(SSHD).exists() else "needs openssh-server"


@dataclass
class Host:
    """One host. `namespace`: its network's name below /run/netns; `pid`: its sshd's."""

    name: str
    namespace: str
    user: str
    address: str
    port: int
    directory: Path
    six: str = ""
    pid: int = 0
    mounts: Path = Path()  #: its mount namespace, by which what runs there is known
    start: Callable[[], None] = lambda: None  #: it anew, as it was at first, once it was `end`ed

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@{self.address}:{self.port}"

    @property
    def root(self) -> Path:
        """Its file system, as this test sees it."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def home(self) -> Path:
        """Its user's home, as this test sees it."""
        return self.root / "home" / self.user

    def pids(self) -> dict[int, list[str]]:
        """What runs there, its sshd aside: pid -> words."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if pid != self.pid and (entry / "ns/mnt").readlink() == self.mounts:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                    if words:  # no zombie
                        found[pid] = words
        return found

    def programs(self) -> dict[int, list[str]]:
        """What its user runs there: `pids` without the processes of connections."""
        return {pid: words for pid, words in self.pids().items() if not words[0].startswith("sshd:")}

    def files(self) -> list[str]:
        """What lies in its user's home, from there; what the bench put there aside."""
        found = (path.relative_to(self.home) for path in self.home.rglob("*"))
        return sorted(str(path) for path in found if path.parts[0] not in (".ssh", ".bashrc"))

    def sever(self) -> int:
        """Kill what serves its connections, at once; how many processes that were."""
        served = [pid for pid, words in self.pids().items() if words[0].startswith("sshd:")]
        for pid in served:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(served)

    def end(self) -> None:
        """Kill all that runs there, its sshd first; its files go with it."""
        for pid in [self.pid, *self.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def execute(self, *command: str) -> str:
        """What a command prints that root runs there."""
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--net", "--", *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def bench(
    *names: str | Mapping[str, str],
    shown: Sequence[Path] = (),
    banner: str = "",
    home_size: str = "100%",
    ahead_s: Mapping[str, int] | None = None,
    sudoers: str = "",
    six: bool = False,
) -> Iterator[dict[str, Host]]:
    """Hosts by name. `names`: of new ones, or a mapping of them to the namespaces that they are to be in.

    banner: what each says before it lets anybody in; home_size: how much goes into a home, as tmpfs takes it; ahead_s: by how
    much hosts' monotonic clocks are ahead of this machine's, in time namespaces; sudoers: all that sudo is told there, in which
    `{user}` is the host's; six: each is reached by IPv6, too (`Host.six`).
    """
    wanted: dict[str, str | None] = {}
    for name in names:
        wanted.update(name if isinstance(name, Mapping) else {name: None})
    mark = secrets.token_hex(2)
    with contextlib.ExitStack() as closing:
        top = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="tb-bench-", dir="/tmp")))
        top.chmod(0o755)
        client = top / "client"
        (client / ".ssh").mkdir(parents=True, mode=0o700)
        make_key(client / ".ssh/id_ed25519")
        before = os.environ.get("HOME")
        closing.callback(
            lambda: os.environ.update(HOME=before) if before is not None else os.environ.pop("HOME")
        )
        os.environ["HOME"] = str(client)
        hosts: dict[str, Host] = {}
        third = secrets.randbelow(256)
        for number, (name, given) in enumerate(wanted.items()):
            namespace = given or f"tb-host-{mark}-{name}"
            if given is None:
                _ip(f"netns add {namespace}")
                closing.callback(_ip, f"netns del {namespace}")
                _ip(f"-n {namespace} link set lo up")
            ours, theirs = (f"198.19.{third}.{4 * number + end}" for end in (1, 2))
            link = f"tbh{mark}{number}"
            _ip(f"link add {link} type veth peer name mgmt0 netns {namespace}")
            closing.callback(subprocess.run, ["ip", "link", "del", link], capture_output=True)
            _ip(f"addr add {ours}/30 dev {link}")
            _ip(f"link set {link} up")
            _ip(f"-n {namespace} addr add {theirs}/30 dev mgmt0")
            _ip(f"-n {namespace} link set mgmt0 up")
            sixes = [f"fd98::{third + 1:x}:{number + 1:x}:{end}" for end in (1, 2)] if six else ["", ""]
            if six:
                _ip(f"addr add {sixes[0]}/112 dev {link} nodad")
                _ip(f"-n {namespace} addr add {sixes[1]}/112 dev mgmt0 nodad")
            directory = top / name
            directory.mkdir()
            host = Host(name, namespace, f"tb-{name}", theirs, 2201 + number, directory, sixes[1])
            _furnish(host, client, 5000 + number, banner)
            if sudoers:
                (directory / "sudoers").write_text(sudoers.replace("{user}", host.user))
                (directory / "sudoers").chmod(0o440)
            ahead = (ahead_s or {}).get(name)
            about = (host, 5000 + number, shown, home_size, ahead)
            host.start = lambda about=about: closing.enter_context(_served(*about))
            host.start()
            hosts[name] = host
        yield hosts


def _furnish(host: Host, client: Path, uid: int, banner: str) -> None:
    directory = host.directory
    make_key(directory / "host_key")
    shutil.copy(client / ".ssh/id_ed25519.pub", directory / "authorized_keys")
    (directory / "banner").write_text(banner)
    (directory / "sshd_config").write_text(
        _CONFIG.format(
            port=host.port,
            address=host.address,
            key=directory / "host_key",
            banner=directory / "banner" if banner else "none",
            six=f"ListenAddress {host.six}" if host.six else "",
        )
    )
    users = f"{host.user}:x:{uid}:{uid}::/home/{host.user}:/bin/bash\n"
    (directory / "passwd").write_text(Path("/etc/passwd").read_text().rstrip("\n") + "\n" + users)
    shadow = directory / "shadow"
    shadow.touch(mode=0o600)
    shadow.write_text(f"root:*:19000::::::\nsshd:*:19000::::::\n{host.user}:*:19000:0:99999:7:::\n")
    with (client / ".ssh/known_hosts").open("a") as known:
        kind, key, *_ = (directory / "host_key.pub").read_text().split()
        known.write(f"[{host.address}]:{host.port} {kind} {key}\n")
        if host.six:
            known.write(f"[{host.six}]:{host.port} {kind} {key}\n")


@contextlib.contextmanager
def _served(host: Host, uid: int, shown: Sequence[Path], home_size: str, ahead: int | None) -> Iterator[None]:
    """Its sshd, while the block runs, and whatever came to run there ended behind it."""
    paths = {Path(sys.base_prefix), Path(sys.prefix).resolve(), _CHECKOUT, *map(Path, shown)}
    hidden = {path: closed for path in paths if (closed := _closed(path)) is not None}
    script = _FURNISH.format(
        shown=" ".join(f"'{path}'" for path in sorted(hidden)),
        closed=" ".join(f"'{path}'" for path in sorted(set(hidden.values()))),
        uid=uid,
        sshd=SSHD,
    )
    enter = [
        "nsenter",
        f"--net=/run/netns/{host.namespace}",
        "unshare",
        "--mount",
        "--uts",
        "--propagation=private",
        *(["--time", "--monotonic", str(ahead)] if ahead is not None else []),
    ]
    printed = host.directory / "log"
    with printed.open("wb") as log:
        words = [*enter, "sh", "-c", script, str(host.directory), host.user, home_size]
        process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    host.pid = process.pid
    try:
        until = time.monotonic() + 20
        while b"Server listening" not in printed.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{host.name}'s sshd is not up: {printed.read_text(errors='replace')}")
            time.sleep(0.02)
        host.mounts = Path(f"/proc/{host.pid}/ns/mnt").readlink()
        yield
    finally:
        while left := host.pids():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        process.kill()
        process.wait()


def _closed(path: Path) -> Path | None:
    """The first directory on the way to a path through which not everybody may go."""
    for above in reversed(path.parents):
        if not above.stat().st_mode & 0o001:
            return above
    return None


def assert_nothing_left(host: Host) -> None:
    """No program of its user's, and no file."""
    assert wait_for(lambda: not host.programs()), host.programs()
    assert set(host.files()) <= {".local", ".local/state"}


def wait_for(true: Callable[[], object], seconds: float = 30.0) -> bool:
    """Whether it becomes true in so many seconds."""
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(true())


@contextlib.contextmanager
def cable(here: Host, there: Host) -> Iterator[None]:
    """Both joined by `eth0`, 10.98.0.1 and 10.98.0.2, while the block runs; a packet on it is one of the network's."""
    _ip(f"link add eth0 netns {here.namespace} type veth peer name eth0 netns {there.namespace}")
    try:
        for number, host in enumerate((here, there), 1):
            _ip(f"-n {host.namespace} addr add 10.98.0.{number}/24 dev eth0")
            _ip(f"-n {host.namespace} link set eth0 up gso_max_segs 1")
        yield
    finally:
        _ip(f"-n {here.namespace} link del eth0")


def make_key(path: Path) -> None:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a bench", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
