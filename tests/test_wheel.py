"""The wheel, built from a copy of this tree and from the sdist, works where nothing of the tree is in reach."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from testbed.hosts import installing, survey
from tests.analysis.make_run import make_run

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "results", "results-published", "tests", "benchmarks"
)
OPTIONAL = {"datasets", "kvpress", "lmcache", "ray"}
"""What is imported only where it is installed: each refusal names it."""
INDIRECT = {"accelerate"}
"""What is declared and imported by nothing of ours: what transformers reads a GGUF file with, and pandas' and
transformers' file formats."""
NAMES = {"pillow": "PIL", "pyyaml": "yaml", "vl-convert-python": "vl_convert"}


LOOK = """
import sys
from testbed.cli import cli
from testbed.experiment.plan import load_plan
from testbed.net.topology.files import load_topology, shipped_topologies
topologies = shipped_topologies()
assert topologies[0].with_name("schema.json").is_file()
for name in sys.argv[1:]:
    load_topology(name) if name in {path.stem for path in topologies} else load_plan(name)
for command in ("--help", "codecs", "tasks", "profiles", "doctor", "plan 5g", "plan claims/q2c"):
    try:
        cli.main(command.split(), prog_name="testbed")
    except SystemExit as ended:
        assert not ended.code, command
"""
"""Opens each shipped file that it is given the name of (a scenario's traces with it), and prints what is known without a run."""


def build(what: str, tree: Path, into: Path) -> Path:
    into.mkdir()
    subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_{what}({str(into)!r})"],
        cwd=tree, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (made,) = into.iterdir()
    return made


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree") / "testbed"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel") / "built")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel alone, which sees the packages that this one has."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--python", home / "bin/python", "install", "--no-index", "--no-deps", wheel],
        check=True,
    )  # fmt: skip
    (packages,) = home.glob("lib/python*/site-packages")
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(seen))
    return home


def run(home: Path, folder: Path, *arguments: str | Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [home / "bin" / arguments[0], *arguments[1:]], cwd=folder, env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_is_the_package_testbed_and_all_of_it(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert tops == {"testbed", next(top for top in tops if top.endswith(".dist-info"))}
    found = (
        path
        for folder in ("testbed", "analysis", "scenarios", "topologies", "devices")
        for path in (ROOT / folder).rglob("*")
    )
    ours = {
        str(path.relative_to(ROOT)) for path in found if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name if name.startswith("testbed/") else f"testbed/{name}" for name in ours} <= names(wheel)


@pytest.mark.slow
def test_the_wheel_that_hosts_get_has_the_same_in_it(wheel: Path, tmp_path: Path) -> None:
    ours, theirs = (zipfile.ZipFile(path) for path in (installing.wheel(tmp_path), wheel))
    left = {name for name in theirs.namelist() if "/licenses/" in name or name.endswith("/top_level.txt")}
    assert set(ours.namelist()) == set(theirs.namelist()) - left
    for name in ours.namelist():
        if not name.endswith(
            ("/RECORD", "/WHEEL", "/METADATA")
        ):  # METADATA is as old as the last `make setup`
            assert ours.read(name) == theirs.read(name), name
    ours.extractall(tmp_path / "there")
    assert survey.copy_of_testbed(str(tmp_path / "there" / "testbed"))["digest"] == installing.digest()


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(build("sdist", tree, tmp_path / "sdist"), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert names(build("wheel", unpacked, tmp_path / "again")) == names(wheel)


@pytest.mark.slow
def test_an_installed_wheel_has_its_scenarios_traces_topologies_and_report(
    installed: Path, tmp_path: Path
) -> None:
    where = "import testbed, importlib.metadata as m; print(testbed.__file__, m.version('split-inference-testbed'))"
    place, version = run(installed, tmp_path, "python", "-c", where).split()
    assert Path(place).is_relative_to(installed)
    assert run(installed, tmp_path, "testbed", "--version") == f"testbed, version {version}\n"
    found = (ROOT / "scenarios").rglob("*.yaml")
    scenarios = sorted(path for path in found if path.parent.name != "expected")
    shipped = [str(path.relative_to(ROOT / "scenarios").with_suffix("")) for path in scenarios]
    shipped += [path.stem for path in (ROOT / "topologies").glob("*.yaml")]
    assert run(installed, tmp_path, "testbed", "devices").count("\n") > len(
        list((ROOT / "devices").iterdir())
    )
    said = run(installed, tmp_path, "python", "-c", LOOK, *shipped)
    assert said.count(" trials of ") == 2 and said.count("\n") > 50
    directory = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), ("split",), ("needle",), examples=3)
    run(installed, tmp_path, "testbed", "report", directory)
    assert (directory / "report.html").stat().st_size > 10_000


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported = set()
    for path in (*ROOT.glob("testbed/**/*.py"), *ROOT.glob("analysis/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=~! ;\[]", text)[0].lower() for text in project["dependencies"]}
    declared = {NAMES.get(name, name) for name in declared}
    assert imported - set(sys.stdlib_module_names) - {"testbed"} - OPTIONAL == declared - INDIRECT
