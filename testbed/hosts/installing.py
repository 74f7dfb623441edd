"""This very testbed, put into an environment on a host: the `python:` of its node.

What is there already stays: a GPU host keeps the torch that fits its driver. What is missing comes in the versions of
`constraints.txt`: from the package index that the host's pip knows, or, where the host reaches none, as wheels that pip
downloads here for that host's Python and machine.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import testbed
from testbed import files
from testbed.errors import EndpointError, StorageError, TestbedError, UsageError
from testbed.hosts import asking, survey
from testbed.hosts.host import Host

PACKAGE = "split-inference-testbed"
OLDEST = (3, 11)
_HERE = Path(testbed.__file__).parent
_ENVIRONMENT = re.compile(r"(?P<folder>.+)/bin/python[0-9.]*")
_SHORT_S, _PIP_S = 120.0, 3600.0
#: What pip writes beside the packages while it unpacks them; and the little that the testbed itself takes.
_UNPACKED, _LEAST_BYTES = 4, 200 << 20
#: Makes a folder among what is sent to a host, which `clean` empties where a lost connection has left it.
_FOLDER = (
    "import os, tempfile; sent = os.path.expanduser('~/.cache/testbed/sent'); os.makedirs(sent, 0o700, True); "
    "print(tempfile.mkdtemp(prefix='wheels-', dir=sent))"
)
_REMOVE = (
    "import os, shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True); "
    "sys.argv[2] and not os.listdir(sys.argv[2]) and os.rmdir(sys.argv[2])"
)
#: What stays as it is where it is there: a GPU host's, whose build fits its driver.
KEPT = frozenset({"torch"})


def digest() -> str:
    """Of this testbed's source, as `survey` has a host's."""
    return survey.copy_of_testbed(str(_HERE))["digest"]


def unfit(found: Mapping[str, Any]) -> str:
    """Why a Python, of which that is what `survey` says, cannot take part in a run of this testbed; empty where it can."""
    if old := _too_old(found):
        return old
    there = found["testbed"]
    if not there:
        return "the testbed is not installed there; testbed hosts install TOPOLOGY puts it there"
    if there["digest"] != digest():
        return f"another testbed than here is there, in {there['path']}; testbed hosts install TOPOLOGY puts this one there"
    return ""


def _too_old(found: Mapping[str, Any]) -> str:
    version = found["python"]["version"]
    if tuple(map(int, version.split(".")[:2])) >= OLDEST:
        return ""
    return f"its Python is {version}, and the testbed needs {_dotted(OLDEST)} or newer; make the environment with a newer one"


def wheel(into: Path) -> Path:
    """The wheel of this very testbed, as it lies here, changed or not. Raises StorageError, UsageError."""
    try:
        installed = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"{PACKAGE} is not installed here, so nothing says what it needs; run `make setup`"
        ) from None
    information = f"{PACKAGE.replace('-', '_')}-{installed.version}.dist-info"
    contents = {f"testbed/{path.relative_to(_HERE)}": path.read_bytes() for path in _sources(_HERE)}
    # Of a checkout, PKG-INFO in its egg-info may be found first, which holds the same.
    told = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    contents[f"{information}/METADATA"] = told.encode()
    contents[f"{information}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    contents[f"{information}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: testbed\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(f"{name},sha256={_hash(data)},{len(data)}\n" for name, data in contents.items())
    contents[f"{information}/RECORD"] = f"{record}{information}/RECORD,,\n".encode()
    path = into / f"{information.removesuffix('.dist-info')}-py3-none-any.whl"
    with files.storing(path), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name == "__pycache__" or path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _sources(path)
        else:
            yield path


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@dataclass
class Installation:
    """One host's: its node's `name` and `python`, by which errors and progress name it."""

    host: Host
    name: str
    python: str
    say: Callable[[str], None]

    def run(self, offline: bool) -> dict[str, Any]:
        """Make the environment, where there is none, and put this testbed there; returns what `survey` then says of it.

        Raises UsageError where the node's `python` is in no environment; EndpointError, StorageError, each with the remedy.
        """
        match = _ENVIRONMENT.fullmatch(self.python)
        if match is None:
            raise UsageError(
                f"{self.name}: install puts the testbed into an environment of its own, and python: {self.python} is in none; "
                "write for example  python: ~/testbed/.venv/bin/python"
            )
        base = self._base(match["folder"])
        python, folder = (_absolute(path, base["home"]) for path in (self.python, match["folder"]))
        with self._environment(base, python, folder) as before:
            self._install(before, python, folder, offline)
        after = self._ask(python, "survey")
        if after["testbed"].get("digest") != digest():
            raise EndpointError(
                f"{self.name}: installed, but its Python imports another testbed: {after['testbed'].get('path', 'none')}"
            )
        return dict(after)

    def _install(self, before: dict[str, Any], python: str, folder: str, offline: bool) -> None:
        with tempfile.TemporaryDirectory() as here:
            built = wheel(Path(here))
            constraints = Path(here) / "constraints.txt"
            constraints.write_text(_constraints(before["packages"]))
            wheels = [built]
            if offline:
                self.say(f"{self.name}: downloading what it lacks")
                wheels += self._download(built, constraints, before, Path(here))
            self._require_room(before, folder, wheels)
            self._put_and_install(python, [constraints, *wheels], offline)

    def _ask(self, python: str, *arguments: str) -> Any:
        return asking.asked(self.host, python, *arguments)

    def _base(self, folder: str) -> dict[str, Any]:
        """What there is before anything is done, told by the Python by which the host was reached. Raises EndpointError."""
        try:
            return dict(self._ask(getattr(self.host, "python", "python3"), "survey", "pythons", folder + "/"))
        except EndpointError as error:
            raise EndpointError(f"{self.name}: {error}") from error

    @contextlib.contextmanager
    def _environment(self, base: dict[str, Any], python: str, folder: str) -> Iterator[dict[str, Any]]:
        """The environment's own survey; made where it is missing, and then gone again where the block fails. Raises
        EndpointError."""
        try:
            there = self._ask(python, "survey")
        except EndpointError:
            self._require_room(base, folder, [])
            self.say(f"{self.name}: making an environment in {folder}")
        else:
            if old := _too_old(there):
                raise EndpointError(f"{self.name}: {old}")
            yield {**there, "room": base["room"]}
            return
        found = {path: (tuple(version), able) for path, (version, able) in base["pythons"].items()}
        new = {path: able for path, (version, able) in found.items() if version >= OLDEST}
        if not new:
            versions = ", ".join(sorted({".".join(map(str, version)) for version, _ in found.values()}))
            raise EndpointError(
                f"{self.name}: its Python is {versions or 'none'}, and the testbed needs {_dotted(OLDEST)} or newer; install one "
                f"there, or make the environment with one of your own: PYTHON -m venv {folder}"
            )
        maker = next((path for path, able in new.items() if able), None)
        if maker is None:
            raise EndpointError(
                f"{self.name}: {next(iter(new))} has no venv module; install it there: sudo apt-get install python3-venv"
            )
        asked = "import os, sys; print(os.path.lexists(sys.argv[1]))"
        fresh = self._call([maker, "-I", "-c", asked, folder], _SHORT_S).strip() == b"False"
        try:
            self._call([maker, "-I", "-m", "venv", folder], _SHORT_S)
            yield {**self._ask(python, "survey"), "room": base["room"]}
        except BaseException:
            if fresh:
                with contextlib.suppress(TestbedError):  # the host may be lost
                    self._remove(maker, folder)
            raise

    def _download(self, *arguments: Any) -> list[Path]:
        try:
            return download(*arguments)
        except TestbedError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _require_room(self, before: dict[str, Any], folder: str, wheels: list[Path]) -> None:
        (free,) = before["room"].values()
        needed = _LEAST_BYTES + _UNPACKED * sum(path.stat().st_size for path in wheels)
        if free < needed:
            raise StorageError(
                f"{self.name}: {free / 1e6:.0f} MB are free at {folder}, and it takes some {needed / 1e6:.0f}; make room there, "
                "or name a python: on a larger disk"
            )

    def _put_and_install(self, python: str, ours: list[Path], offline: bool) -> None:
        printed = self._call([python, "-I", "-c", _FOLDER], _SHORT_S)
        there = Path(printed.decode().strip().splitlines()[-1])
        try:
            for path in ours:
                self.host.put(path, there / path.name)
            constraints, built = there / ours[0].name, there / ours[1].name
            pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar=off"]
            source = ["--no-index", "--find-links", str(there)] if offline else []
            self.say(f"{self.name}: installing")
            self._call([*pip, *source, "--constraint", str(constraints), str(built)], _PIP_S, offline)
            # The same version may be there with other contents.
            self._call([*pip, "--no-index", "--no-deps", "--force-reinstall", str(built)], _PIP_S)
        finally:
            self._remove(python, str(there), str(there.parent))

    def _remove(self, python: str, folder: str, if_empty: str = "") -> None:
        asking.run(self.host, [python, "-I", "-c", _REMOVE, folder, if_empty], _SHORT_S)

    def _call(self, argv: list[str], within_s: float, offline: bool = False) -> bytes:
        """What a program that is to do well prints. Raises EndpointError or StorageError with what it complains of, and the
        remedy."""
        what = " ".join(word for word in argv[:4] if word != "-I")
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            status, printed, _ = asking.run(self.host, argv, within_s, log, what)
            complaints = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if status:
            raise _explained(self.name, what, _gist(printed.decode(errors="replace") + complaints), offline)
        return printed


def _gist(text: str) -> str:
    """Of what a program says, complaints last, the line that says why: pip has advice behind it; and names what it has not found
    where it tells how it looked for it."""
    asked = ", ".join(dict.fromkeys(re.findall(r"\(constraint\) (\S+)", text)))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
    why = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
    return f"{why} (asked for: {asked})" if asked and why.startswith("Cannot install") else why


def _explained(name: str, what: str, said: str, offline: bool = False) -> TestbedError:
    """The error that a failed program stands for."""
    if "Errno 28" in said or "No space left" in said:
        return StorageError(
            f"{name}: no room left there ({said[-160:]}); make room, or name a python: on a larger disk"
        )
    if "No module named pip" in said:
        return EndpointError(f"{name}: its environment has no pip; remove it, and run this again")
    if re.search("No matching distribution|Could not find a version|Cannot install", said):
        if offline:
            return EndpointError(
                f"{name}: {said[-200:]}; no wheel of it was found for that host: put it into the environment there first"
            )
        return EndpointError(
            f"{name}: {said[-200:]}; where the host reaches no package index, use  testbed hosts install --offline"
        )
    return EndpointError(f"{name}: {what} says: {said[-300:]}")


def _absolute(path: str, home: str) -> str:
    return home + path[1:] if path.startswith("~/") else path


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _constraints(there: Collection[str]) -> str:
    """The versions that this testbed was tested with, but for what was there already and is to stay."""
    lines = (_HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.partition("==")[0] not in KEPT & set(there)) + "\n"


def download(built: Path, constraints: Path, there: Mapping[str, Any], into: Path) -> list[Path]:
    """The wheels that a host lacks, for its Python and machine, into a folder. Raises EndpointError with pip's own words."""
    target = _target(there)
    report = into / "report.json"
    resolve = ["--dry-run", "--ignore-installed", "--report", str(report), "--target", str(into / "nothing")]
    _pip("install", *resolve, *target, "--constraint", str(constraints), str(built))
    missing = _missing(json.loads(report.read_bytes())["install"], there["packages"])
    folder = into / "wheels"
    if missing:
        _pip("download", "--no-deps", "--dest", str(folder), *target, *missing)
    return sorted(folder.glob("*.whl"))


def _target(there: Mapping[str, Any]) -> list[str]:
    """pip's options for a host's Python and machine. Raises UsageError where wheels are made for no such system."""
    library, version = there["libc"]
    if library != "glibc":
        raise UsageError(
            f"its C library is {library or 'unknown'}, and wheels are looked for with glibc; install with its own pip"
        )
    machine = there["machine"]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(int(version.split(".")[1]), 4, -1)]
    platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    python = ".".join(there["python"]["version"].split(".")[:2])
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return [*options, *(word for platform in platforms for word in ("--platform", platform))]


def _missing(resolved: list[dict[str, Any]], there: Mapping[str, str]) -> list[str]:
    """Of what the testbed needs, as pip's report has it, what is not there: ``name==version``. What only a package that stays
    would need, such as the libraries of another torch, is not asked for."""
    known = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in resolved}
    found: dict[str, str] = {}
    waiting = [canonicalize_name(PACKAGE)]
    while waiting:
        needed = known[waiting.pop()].get("requires_dist", [])
        for name in {
            canonicalize_name(Requirement(text).name) for text in needed
        } & known.keys() - found.keys():
            version = known[name]["version"]
            if name in there and (name in KEPT or there[name] == version):
                continue
            found[name] = f"{name}=={version}"
            waiting.append(name)
    return sorted(found.values())


def _pip(*arguments: str) -> None:
    argv = [
        sys.executable,
        "-I",
        "-m",
        "pip",
        "--disable-pip-version-check",
        *arguments,
        "--progress-bar=off",
    ]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EndpointError(f"pip {arguments[0]} says here: {_gist(done.stdout + done.stderr)[-300:]}")
