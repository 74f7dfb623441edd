"""The testbed is put into an environment of a host, here this machine's: what is there stays, and what cannot be is one line."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from testbed.errors import EndpointError, StorageError, TestbedError, UsageError
from testbed.hosts import installing
from testbed.hosts.installing import Installation
from testbed.hosts.local import Local, LocalProcess
from testbed.identity import invoking_user
from tests.hosts.bench import OLD_PYTHON

OURS = ("split_inference_testbed", "__editable__", "__pycache__")
CLOSURE = [
    {"metadata": {"name": "split-inference-testbed", "version": "0", "requires_dist": ["Torch>=2", "numpy", "dev; extra=='d'"]}},
    {"metadata": {"name": "torch", "version": "2.13.0", "requires_dist": ["nvidia-cublas==1", "sympy", "filelock"]}},
    {"metadata": {"name": "nvidia-cublas", "version": "1"}},
    {"metadata": {"name": "sympy", "version": "1.14.0", "requires_dist": ["mpmath"]}},
    {"metadata": {"name": "mpmath", "version": "1.3.0"}},
    {"metadata": {"name": "filelock", "version": "4.3.1"}},
    {"metadata": {"name": "numpy", "version": "2.4.6"}},
]  # fmt: skip


class Elsewhere(Local):
    """This machine with other programs: those in `folder` come first."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def start(
        self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None = None
    ) -> LocalProcess:
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        return super().start(["env", f"PATH={path}", *argv], {**env, "PYTHONPATH": None}, log)


def python3(folder: Path, version: tuple[int, ...], able: bool) -> Elsewhere:
    """A host whose Pythons are of that version, and make environments or not."""
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        script = folder / name
        script.write_text(
            "#!/bin/sh\n"
            f"case \"$3\" in 'import json, sys'*) echo '[{list(version)}, {str(able).lower()}]';; "
            f'*) exec {sys.executable} "$@";; esac\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return Elsewhere(folder)


def install(host: Local, python: str, offline: bool = False) -> tuple[dict[str, object], list[str]]:
    said: list[str] = []
    return Installation(host, "edge", python, said.append).run(offline), said


def complaint(kind: type[TestbedError], host: Local, python: str) -> str:
    with pytest.raises(kind) as raised:
        install(host, python)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def equipped(tmp_path: Path) -> Path:
    """An environment that its user made, with all that the testbed needs, and no testbed."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for folder in (Path(path) for path in sys.path if Path(path).name == "site-packages"):
        for entry in folder.iterdir():
            ours = entry.name.startswith(OURS) or entry.name.endswith(".pth")
            if not ours and not (theirs / entry.name).exists():
                (theirs / entry.name).symlink_to(entry)
    (packages / "theirs.pth").write_text(f"{theirs}\n")
    return home


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_what_is_there_stays_and_this_very_testbed_comes(equipped: Path, offline: bool) -> None:
    python = str(equipped / "bin" / "python")
    if offline:  # and a wheel that the host lacks
        for path in (equipped.parent / "theirs").glob("xxhash*"):
            path.unlink()
    after, said = install(Local(), python, offline)
    assert after["testbed"]["digest"] == installing.digest()  # type: ignore[index]
    assert str(after["testbed"]["path"]).startswith(str(equipped))  # type: ignore[index]
    for name in ("torch", "xxhash"):
        assert after["packages"][name] == importlib.metadata.version(name)  # type: ignore[index]
    assert said == (["edge: downloading what it lacks"] if offline else []) + ["edge: installing"]
    assert not list(Path(invoking_user().home, ".cache/testbed/sent").glob("wheels-*"))
    (packages,) = equipped.glob("lib/python*/site-packages")
    changed = packages / "testbed" / "units.py"
    changed.write_text(f"{changed.read_text()}# changed\n")
    again, _ = install(Local(), python)
    assert again["testbed"]["digest"] == installing.digest()  # type: ignore[index]
    done = subprocess.run([equipped / "bin" / "testbed", "profiles"], capture_output=True, text=True)
    assert done.returncode == 0 and "5g-mid" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["here", "there"])
def test_a_wheel_that_cannot_be_had_is_one_line_and_a_new_environment_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """The index has none, or what was downloaded is not all that the host's own pip asks for."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if lacking == "there":
        monkeypatch.setattr(installing, "download", lambda *_: [])
    with pytest.raises(EndpointError) as raised:
        install(Local(), str(tmp_path / "new/bin/python"), offline=True)
    said = str(raised.value)
    assert "\n" not in said and said.startswith("edge: ") and re.search(r"\(asked for: \w+==", said)
    assert ("put it into the environment there first" in said) == (lacking == "there")
    assert not (tmp_path / "new").exists()
    assert not list(Path(invoking_user().home, ".cache/testbed/sent").glob("wheels-*"))


def test_a_directory_that_was_there_stays_where_no_environment_can_be_made_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/own").write_text("mine")
    failing = python3(tmp_path, (3, 12, 3), True)
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        script = tmp_path / name
        script.write_text(
            script.read_text().replace("case", '[ "$3" != venv ] || { echo no >&2; exit 1; }\ncase', 1)
        )
    assert "-m venv says: no" in complaint(EndpointError, failing, str(tmp_path / "new/bin/python"))
    assert (tmp_path / "new/own").read_text() == "mine"


def test_a_python_in_no_environment_is_refused() -> None:
    assert "python: python3 is in none; write for example" in complaint(UsageError, Local(), "python3")


def test_another_python_is_named_with_what_is_needed(tmp_path: Path) -> None:
    host = python3(tmp_path, (3, 10, 12), True)
    said = complaint(EndpointError, host, str(tmp_path / "new" / "bin" / "python"))
    assert "its Python is 3.10.12, and the testbed needs 3.11 or newer" in said
    assert f"PYTHON -m venv {tmp_path / 'new'}" in said


def test_an_environment_of_an_old_python_is_named_with_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "python"
    script.write_text(OLD_PYTHON.format(python=sys.executable))
    script.chmod(0o755)
    said = complaint(EndpointError, Local(), str(script))
    assert said == (
        "edge: its Python is 3.10.12, and the testbed needs 3.11 or newer; make the environment with a newer one"
    )


def test_a_python_without_venv_is_named_with_the_package(tmp_path: Path) -> None:
    host = python3(tmp_path, (3, 12, 3), False)
    said = complaint(EndpointError, host, str(tmp_path / "new" / "bin" / "python"))
    assert said.endswith("has no venv module; install it there: sudo apt-get install python3-venv")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk that has no room for an environment."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.netns
def test_a_host_without_room_is_told_by_one_line_and_left_as_it_was(small: Path) -> None:
    said = complaint(StorageError, Local(), str(small / "venv" / "bin" / "python"))
    assert re.match(r"edge: 6\d MB are free at .*/small/venv, and it takes some 2\d\d; make room there", said)
    assert list(small.iterdir()) == []


def test_wheels_that_do_not_fit_are_not_sent(tmp_path: Path) -> None:
    (tmp_path / "large.whl").touch()
    os.truncate(tmp_path / "large.whl", 10**9)
    installation = Installation(Local(), "edge", "venv/bin/python", print)
    with pytest.raises(
        StorageError, match="edge: 900 MB are free at venv, and it takes some 4210; make room"
    ):
        installation._require_room({"room": {"venv": 900e6}}, "venv", [tmp_path / "large.whl"])


def test_what_a_host_lacks_is_what_only_packages_need_that_do_not_stay() -> None:
    everything = "filelock==4.3.1 mpmath==1.3.0 numpy==2.4.6 nvidia-cublas==1 sympy==1.14.0 torch==2.13.0"
    assert installing._missing(CLOSURE, {}) == everything.split()
    assert installing._missing(CLOSURE, {"torch": "2.5.0a0+nv24.8", "numpy": "1.26.0"}) == ["numpy==2.4.6"]
    assert installing._missing(CLOSURE, {"torch": "2.5.0", "numpy": "2.4.6"}) == []


def test_constraints_leave_the_torch_that_is_there_alone() -> None:
    all_of_them, but_torch = (installing._constraints(there) for there in ((), ("torch", "numpy")))
    assert "torch==" in all_of_them and "numpy==" in all_of_them
    assert "torch==" not in but_torch and "numpy==" in but_torch


def test_wheels_are_asked_for_the_hosts_python_and_machine() -> None:
    there = {"libc": ["glibc", "2.31"], "machine": "aarch64", "python": {"version": "3.12.3"}}
    options = installing._target(there)
    assert options[options.index("--python-version") + 1] == "3.12"
    platforms = [after for word, after in itertools.pairwise(options) if word == "--platform"]
    assert platforms[0] == "manylinux_2_31_aarch64" and "manylinux2014_aarch64" in platforms
    with pytest.raises(UsageError, match="its C library is unknown"):
        installing._target({**there, "libc": ["", ""]})


@pytest.mark.parametrize(
    ("said", "kind", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", StorageError, "make room"),
        ("/x/python: No module named pip", EndpointError, "remove it, and run this again"),
        ("No matching distribution found for numpy", EndpointError, "--offline"),
        ("Cannot install torch because these have conflicts", EndpointError, "--offline"),
        ("ERROR: something else", EndpointError, "says: ERROR: something else"),
    ],
)
def test_what_pip_says_becomes_one_line_with_a_remedy(said: str, kind: type, remedy: str) -> None:
    error = installing._explained("edge", "python -m pip", said)
    assert type(error) is kind and str(error).startswith("edge: ") and remedy in str(error)


def test_of_what_pip_prints_the_line_that_says_why_is_told() -> None:
    printed = "WARNING: old\nERROR: No matching distribution found for x\n\nfor help visit somewhere\n"
    assert installing._gist(printed) == "No matching distribution found for x"
    assert installing._gist("Traceback\nOSError: [Errno 28] No space left on device\n").startswith("OSError")
    assert installing._gist("") == "nothing"


def test_a_wheel_says_what_it_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-",
         str(installing.wheel(tmp_path))], capture_output=True, text=True, check=True,
    )  # fmt: skip
    (one,) = json.loads(done.stdout)["install"]
    assert one["metadata"]["name"] == "split-inference-testbed"
