"""No process takes a module from the directory that the user happens to be in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.hosts.processes import processor_share, scheduled

MODULES = {
    "click",
    "gguf",
    "msgspec",
    "numpy",
    "pip",
    "torch",
    "transformers",
    "yaml",
    *sys.stdlib_module_names,
}
START = """
from pathlib import Path
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Load
from testbed.errors import UsageError
from testbed.hosts.local import Local
endpoint = Endpoint.start("cloud", Local(), Path("log"))
try:
    with endpoint.process:
        endpoint.call(Load("nowhere", "cpu"), 60)
except UsageError as error:
    print(error)
print(Path("log").read_text())
"""
DIAGNOSE = """
from testbed.diagnosis.request import diagnosed
from testbed.errors import TestbedError
try:
    diagnosed({"model": "nowhere"}, print)
except TestbedError as error:
    print(error)
"""


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A directory with modules that say who ran them."""
    for module in MODULES:
        (tmp_path / f"{module}.py").write_text("import os, sys; os.write(2, b'POISON ' + __file__.encode())\n"
                                               f"open({str(tmp_path / 'executed')!r}, 'a').write(__file__)\n")  # fmt: skip
    return tmp_path


def ran(directory: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    executed = directory / "executed"
    assert not executed.exists(), executed.read_text()
    return done.stdout + done.stderr


def test_not_an_endpoint(poisoned: Path) -> None:
    said = ran(poisoned, sys.executable, "-P", "-c", START)
    assert "nowhere" in said and "POISON" not in said


def test_not_a_diagnosis(poisoned: Path) -> None:
    assert "nowhere" in ran(poisoned, sys.executable, "-P", "-c", DIAGNOSE)


def test_not_the_conversion_of_a_model(poisoned: Path) -> None:
    (poisoned / "broken.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-P", "-m", "testbed", "models", "fetch", "broken.gguf"]
    assert "could not be converted" in ran(poisoned, *command)


def test_not_the_command_line_called_as_a_module(poisoned: Path) -> None:
    """But for what `python -m` itself needs, before anything of ours runs."""
    needs = [sys.executable, "-I", "-c", "import runpy, sys; print(*sys.modules)"]
    for module in subprocess.run(needs, capture_output=True, text=True, check=True).stdout.split():
        (poisoned / f"{module}.py").unlink(missing_ok=True)
    assert "q2c" in ran(poisoned, sys.executable, "-m", "testbed", "codecs")


@pytest.mark.netns
def test_not_what_runs_as_root_in_a_network(poisoned: Path) -> None:
    program = (
        "from testbed.net.fabric.fabric import Fabric\n"
        "from testbed.net.calibration.calibrate import calibrate\n"
        "from testbed.net.profile.profile import parse_profile\n"
        "from testbed.net.topology.files import load_topology\n"
        "with Fabric.build(load_topology('edge-cloud'), 'userspace') as fabric:\n"
        "    (link, *_) = fabric.topology.links\n"
        "    profile = parse_profile('rate=100mbit,delay=1ms')\n"
        "    fabric.apply(link.name, profile)\n"
        "    print(calibrate(fabric, link.name, profile).ok)\n"
    )
    assert ran(poisoned, sys.executable, "-P", "-c", program).strip() in ("True", "False")


def test_of_pythonpath_only_whole_paths_reach_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed import programs

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "below", "/somewhere"]))
    here = str(Path(__file__).parents[1])
    assert programs.environment()["PYTHONPATH"].split(os.pathsep) == [here, "/somewhere"]


def test_a_thread_that_ended_takes_nothing_from_the_share_of_a_processor() -> None:
    before = scheduled()
    sum(range(3_000_000))
    shares = processor_share(before), processor_share({**before, "gone": (1 << 60, 1 << 60)})
    if shares[0] is not None:  # a kernel that counts it
        assert all(share is not None and 0 < share <= 1 for share in shares)
