"""`testbed run` where a host does not do: one line each, with what mends it, before anything of the run is made there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import bench as benches
from tests.hosts.bench import OLD_PYTHON, Host, bench, make_key, wait_for
from tests.runs import run

pytestmark = [
    pytest.mark.netns,
    pytest.mark.usefixtures("own_state"),
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]

SCENARIO = "name: refused\nplacements: [split]\ncodecs: [int8]\ntasks: [needle]\nexamples: 1\n"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Host]:
    with bench("cloud", home_size="512k") as made:
        yield made["cloud"]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ~/.ssh of the test's own, as the bench made it."""
    shutil.copytree(Path("~/.ssh").expanduser(), tmp_path / ".ssh")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ssh"


def wrong_key(cloud: Host, client: Path) -> None:
    (client / "id_ed25519").unlink()
    make_key(client / "id_ed25519")


def unknown(cloud: Host, client: Path) -> None:
    (client / "known_hosts").write_text("")


def changed(cloud: Host, client: Path) -> None:
    known = client / "known_hosts"
    make_key(client / "other")
    known.write_text(
        " ".join([known.read_text().split()[0], *(client / "other.pub").read_text().split()[:2]])
    )


def old_python(cloud: Host, client: Path) -> None:
    script = cloud.home / "python"
    script.write_text(OLD_PYTHON.format(python=sys.executable))
    script.chmod(0o755)


def bare_python(cloud: Host, client: Path) -> None:
    (cloud.home / "python").symlink_to("/usr/bin/python3")


def another_testbed(cloud: Host, client: Path) -> None:
    script = cloud.home / "python"
    (cloud.home / "testbed").mkdir()
    (cloud.home / "testbed/__init__.py").write_text("# of another day\n")
    script.write_text(f'#!/bin/sh\n[ "$1" = -I ] && shift\nPYTHONPATH=$HOME exec {sys.executable} "$@"\n')
    script.chmod(0o755)


def closed_home(cloud: Host, client: Path) -> None:
    os.chown(cloud.home, 0, 0)


def full_disk(cloud: Host, client: Path) -> None:
    with (cloud.home / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while file.write(bytes(4096)):
            pass


@pytest.fixture
def mended(cloud: Host) -> Iterator[None]:
    owner = cloud.home.stat()
    yield
    os.chown(cloud.home, owner.st_uid, owner.st_gid)
    subprocess.run(
        ["rm", "-rf", *(str(cloud.home / name) for name in ("python", "testbed", "filler"))], check=True
    )
    assert wait_for(lambda: not cloud.programs())
    assert set(cloud.files()) <= {".local", ".local/state"}


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        (wrong_key, 2, "lets tb-cloud in by none of the keys here; ssh-copy-id -p "),
        (unknown, 2, "this host is not known: its key is ssh-ed25519 SHA256:"),
        (changed, 2, "its host key has changed: SHA256:"),
        (
            old_python,
            2,
            "its Python is 3.10.12, and the testbed needs 3.11 or newer; make the environment with",
        ),
        (bare_python, 2, "the testbed is not installed there; testbed hosts install TOPOLOGY"),
        (
            another_testbed,
            2,
            "another testbed than here is there, in /home/tb-cloud/testbed; testbed hosts install",
        ),
        (closed_home, 1, "Permission denied"),
        (full_disk, 1, "No space left on device"),
    ],
)
def test_a_host_that_does_not_do_is_one_line_and_nothing_is_left(
    wrong: Callable[[Host, Path], None],
    status: int,
    said: str,
    cloud: Host,
    client: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    ends = f"edge: {{host: local, interface: lo}}, cloud: {{host: '{cloud.url}', python: PYTHON}}"
    link = "{name: access, a: edge, b: cloud, profile: measured}"
    wrong(cloud, client)
    python = "~/python" if os.path.lexists(cloud.home / "python") else sys.executable
    (tmp_path / "real.yaml").write_text(f"nodes: {{{ends}}}\nlinks: [{link}]\n".replace("PYTHON", python))
    (tmp_path / "tiny.yaml").write_text(f"{SCENARIO}model: {tiny_model('llama')}\ntopology: real.yaml\n")
    done = run(str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"))
    lines = [line for line in done.errors.splitlines() if line.startswith("testbed: ")]
    print(done.errors)
    assert done.status == status and len(lines) == 1 and said in lines[0]
    assert "Traceback" not in done.errors and not (tmp_path / "out/trials.jsonl").exists()
