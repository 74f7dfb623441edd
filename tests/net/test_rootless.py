"""Networks without root, as a plain user: in a mount namespace where that user may read this Python, whoever owns it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.hosts import namespaces, rootless

REPOSITORY = Path(__file__).parents[2]
# The project or the interpreter may lie in a directory that others may not enter: `opened` puts a file system of the same
# layout with just these in its place.
SCRIPT = """
set -e
{opened}
cd {repository}
mount -t tmpfs none /dev/net
{device}
exec setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/tmp PYTHONDONTWRITEBYTECODE=1 SHELL=/bin/sh \\
    {python} -m testbed {arguments}
"""

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(rootless.obstacle()), reason=f"no user namespaces: {rootless.obstacle()}"),
]


def opened(*needed: Path) -> str:
    """Shell commands, for a mount namespace, after which every user may enter these directories."""
    hidden = {path: closed for path in needed if (closed := _closed(path))}
    if not hidden:
        return "true"
    lines = ["mount -t tmpfs none /mnt"]
    for number, path in enumerate(hidden):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {path} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {closed}" for closed in sorted(set(hidden.values()))]
    for number, path in enumerate(hidden):
        lines += [f"mkdir -p {path}", f"mount --bind /mnt/{number} {path}"]
    return "\n".join(lines)


def _closed(path: Path) -> Path | None:
    """The first directory on the way to a path that others may not enter."""
    way = [*reversed(path.parents), path]
    return next((place for place in way if not place.stat().st_mode & 0o001), None)


def as_plain_user(arguments: str, said: str = "", tun: bool = True) -> subprocess.CompletedProcess[str]:
    """A testbed command as a user without any right, on a machine where everybody may open /dev/net/tun, or nobody."""
    script = SCRIPT.format(
        repository=REPOSITORY,
        opened=opened(REPOSITORY, Path(sys.base_prefix)),
        python=sys.executable,
        device="mknod -m 666 /dev/net/tun c 10 200" if tun else "true",
        arguments=arguments,
    )
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], input=said, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("tun", [True, False], ids=["with TAPs", "with packet sockets"])
def test_a_plain_user_builds_a_network_with_an_emulated_link_and_leaves_nothing(tun: bool) -> None:
    before = namespaces.names()
    commands = (
        f"{sys.executable} -m testbed exec edge -- ping -c 3 -i 0.05 cloud\n"
        f"{sys.executable} -m testbed exec edge -- ping -4 -c 1 cloud\n"
        f"{sys.executable} -m testbed show\n"
    )
    done = as_plain_user(
        "up edge-cloud --rootless --emulator userspace --link access=rate=20mbit,delay=30ms", commands, tun
    )
    assert "3 received" in done.stdout, done.stderr
    assert "1 received" in done.stdout
    time_text = done.stdout.rpartition("time=")[2].split()[0]
    assert 60 <= float(time_text) < 80
    assert "tb-" in done.stdout
    assert namespaces.names() == before


def test_the_exit_status_is_the_commands() -> None:
    done = as_plain_user("calibrate --rootless no-such-profile")
    assert done.returncode == 2
    assert "unknown profile 'no-such-profile'" in done.stderr


def test_nothing_outlives_the_process_that_entered_even_when_it_is_killed() -> None:
    program = (
        "import os, sys, time; from testbed.hosts import rootless; rootless.enter(); "
        "os.spawnvp(os.P_NOWAIT, 'sleep', ['sleep', sys.argv[1]]); print('inside', flush=True); time.sleep(100)"
    )
    mark = f"100.{os.getpid()}"
    with subprocess.Popen(
        [sys.executable, "-c", program, mark], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "inside\n"
        outer.kill()
        assert outer.stdout.read() == ""  # closed by the last process that held it
    assert not [
        entry for entry in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in entry.read_bytes()
    ]
