"""Behind sudo: what lies among the user's files leads root nowhere that the user could not go."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.analysis.make_run import make_run

ROOT = Path(__file__).parents[1]
USER = 65534
SECRET = "root's own words\n"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act for somebody else")


def _others_reach(path: Path) -> bool:
    return all(part.stat().st_mode & stat.S_IXOTH for part in path.resolve().parents)


def _interpreter() -> str:
    """One whose own library everybody can read, with the modules of this one."""
    if _others_reach(Path(os.__file__)):
        return sys.executable
    shared = f"/usr/bin/python3.{sys.version_info.minor}"
    if not Path(shared).exists():
        pytest.skip("this interpreter lies where only root can read it")
    return shared


def behind_sudo(program: str, *arguments: str, cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """A program in a process that root has by `sudo`, in which files are the user's."""
    modules = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    environment = {**os.environ, "SUDO_UID": str(USER), "SUDO_GID": str(USER), "PYTHONPATH": modules}
    environment["MPLCONFIGDIR"] = (
        tempfile.gettempdir()
    )  # where there is none that it can write to, matplotlib says so
    body = "from testbed.identity import assumed\nimport sys\nwith assumed():\n" + "".join(
        f"    {line}\n" for line in program.strip().splitlines()
    )
    return subprocess.run(
        [_interpreter(), "-P", "-c", body, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def testbed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return behind_sudo("from testbed.cli import main\nmain()", *arguments)


testbed.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory of root's that others can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="testbed-", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of the user's."""
    made = tmp_path / "home"
    made.mkdir()
    os.chown(made, USER, USER)
    return made


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file that only root may read and write; it is as it was when the test ends."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    yield path
    about = path.lstat()
    assert (path.read_text(), about.st_uid, about.st_mode & 0o777) == (SECRET, 0, 0o600)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Path]:
    """A directory that only root may write to; nothing is in it when the test ends."""
    path = tmp_path / "guarded"
    path.mkdir(mode=0o755)
    yield path
    assert list(path.iterdir()) == []
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o755)


@pytest.fixture
def run(home: Path) -> Path:
    """A finished run's directory, the user's."""
    made = make_run(home / "run", examples=1)
    for path in (home, *home.rglob("*")):
        os.chown(path, USER, USER)
    return made


def all_users(directory: Path) -> bool:
    return all((path.lstat().st_uid, path.lstat().st_gid) == (USER, USER) for path in directory.rglob("*"))


START = """
from pathlib import Path
from testbed.experiment.plan import load_plan
from testbed.experiment.results import RunDirectory
from testbed.experiment.session import in_one_process
with in_one_process(load_plan("quick"), RunDirectory(Path(sys.argv[1])), print):
    pass
"""


def test_an_endpoints_log_that_is_a_link_is_not_followed(run: Path, secret: Path) -> None:
    (run / "logs").mkdir()
    os.chown(run / "logs", USER, USER)
    (run / "logs" / "loopback.log").symlink_to(secret)
    done = behind_sudo(START, str(run))
    assert "loopback.log is a link" in done.stderr


def test_an_endpoints_log_is_the_users(run: Path) -> None:
    assert behind_sudo(START, str(run)).returncode == 0
    assert (run / "logs" / "loopback.log").is_file()
    assert all_users(run)


def test_a_directory_of_logs_that_is_a_link_leads_where_the_user_may_write(run: Path, guarded: Path) -> None:
    (run / "logs").symlink_to(guarded)
    assert "Permission denied" in behind_sudo(START, str(run)).stderr


APPEND = """
from pathlib import Path
from testbed.experiment.results import RunDirectory
from testbed.experiment.row import Row
directory = RunDirectory(Path(sys.argv[1]))
rows = list(directory.rows())
directory.append(Row(**rows[0]))
"""


def test_rows_that_are_a_link_are_neither_read_nor_written(run: Path, secret: Path) -> None:
    (run / "trials.jsonl").unlink()
    (run / "trials.jsonl").symlink_to(secret)
    for program in (APPEND, APPEND.replace("rows = ", "rows = [vars(directory)] or "), "{REPAIR}"):
        program = program.replace("{REPAIR}", APPEND.split("rows")[0] + "directory.repair()")
        done = behind_sudo(program, str(run))
        assert done.returncode != 0
        assert SECRET.strip() not in done.stdout + done.stderr


def test_rows_that_are_a_pipe_are_not_waited_for(run: Path) -> None:
    (run / "trials.jsonl").unlink()
    os.mkfifo(run / "trials.jsonl")
    os.chown(run / "trials.jsonl", USER, USER)
    done = testbed("plot", str(run))
    assert "has no finished trials" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_name_that_could_be_foreseen_is_not_used(run: Path, secret: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom testbed.experiment.results import RunDirectory\n"
        "run = Path(sys.argv[1])\n"
        "for name in ('manifest.json', 'trials.parquet'):\n"
        "    (run / f'.{name}.{os.getpid()}').symlink_to(sys.argv[2])\n"
        "directory = RunDirectory(run)\n"
        "directory.write('manifest.json', directory.manifest())\n"
        "directory.write_parquet()\n"
    )
    done = behind_sudo(program, str(run), str(secret))
    assert done.returncode == 0, done.stderr
    assert all_users(run)


def test_figures_and_reports_go_nowhere_that_links_point(run: Path, secret: Path, guarded: Path) -> None:
    (run / "summary.csv").unlink(missing_ok=True)
    (run / "summary.csv").symlink_to(secret)
    done = testbed("plot", str(run), "timeline")
    assert done.returncode == 0, done.stderr
    assert not (run / "summary.csv").is_symlink()
    assert all_users(run)
    for figure in (run / "figures").iterdir():
        figure.unlink()
    (run / "figures").rmdir()
    (run / "figures").symlink_to(guarded)
    done = testbed("plot", str(run), "timeline")
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


def test_a_run_directory_that_is_a_link_leads_where_the_user_may_write(home: Path, guarded: Path) -> None:
    (home / "results").symlink_to(guarded)
    program = (
        "from pathlib import Path\nfrom testbed.experiment.results import RunDirectory\n"
        "RunDirectory.create(Path(sys.argv[1]))\n"
    )
    assert "Permission denied" in behind_sudo(program, str(home / "results" / "run")).stderr


def test_a_directory_that_is_swapped_meanwhile_is_written_as_the_user(home: Path, guarded: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom testbed.experiment.results import RunDirectory\n"
        "directory = RunDirectory.create(Path(sys.argv[1]))\n"
        "os.rename(sys.argv[1], sys.argv[1] + '-before')\n"
        "os.symlink(sys.argv[2], sys.argv[1])\n"
        "directory.write('manifest.json', {})\n"
    )
    assert "Permission denied" in behind_sudo(program, str(home / "run"), str(guarded)).stderr


def test_the_model_cache_is_written_as_the_user(home: Path, secret: Path, guarded: Path) -> None:
    program = (
        "import os\nfrom pathlib import Path\nfrom testbed.models import fetching\n"
        "os.environ['TESTBED_CACHE'] = sys.argv[1]\n"
        "with fetching._building('some') as directory:\n"
        "    fetching._record(directory, kind='preset')\n"
    )
    cache = home / "cache"
    assert behind_sudo(program, str(cache)).returncode == 0
    assert (cache / "models" / "some" / "source.json").is_file()
    assert all_users(home)
    (cache / "models" / ".some.lock").unlink()
    (cache / "models" / ".some.lock").symlink_to(secret)
    assert "is a link" in behind_sudo(program, str(cache)).stderr
    (home / "elsewhere").symlink_to(guarded)
    assert "Permission denied" in behind_sudo(program, str(home / "elsewhere")).stderr


@pytest.mark.parametrize("command", [["plan"], ["up"], ["plan", "quick", "--set"]])
def test_a_file_that_only_root_may_read_is_not_read(command: list[str], secret: Path) -> None:
    named = f"topology={secret}" if command[-1] == "--set" else str(secret)
    done = testbed(*command, named)
    assert done.returncode == 2
    assert "Permission denied" in done.stderr
    assert SECRET.strip() not in done.stdout + done.stderr


def test_programs_are_looked_for_where_the_system_has_them(home: Path) -> None:
    (home / "nsenter").write_text("#!/bin/sh\ntouch executed\n")
    (home / "nsenter").chmod(0o755)
    program = "import shutil\nprint(shutil.which('nsenter'))"
    before, os.environ["PATH"] = os.environ["PATH"], f"{home}:{os.environ['PATH']}"
    try:
        assert not behind_sudo(program).stdout.startswith(str(home))
    finally:
        os.environ["PATH"] = before


def test_root_itself_keeps_its_files(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom testbed.identity import assumed; from testbed.identity import of_user\n"
        "with assumed():\n    open(sys.argv[1], 'w').close()\nprint(of_user())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}
    done = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path / "file")],
                          env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "{}\n", done.stderr
    assert (tmp_path / "file").stat().st_uid == 0


@pytest.mark.netns
class TestANetworkBehindSudo:
    def test_is_built_used_and_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
        made = testbed("up", "edge-cloud", "--emulator", "userspace", "--json")
        try:
            assert made.returncode == 0, made.stderr
            inside = testbed(
                "exec",
                "edge",
                "--",
                "sh",
                "-c",
                "id -u; id -G; ping -c1 -W5 cloud >&2; cat /proc/self/status | grep ^Uid",
            )
            assert inside.returncode == 0, inside.stderr
            assert inside.stdout.splitlines()[:2] == ["0", " ".join(map(str, {os.getgid(), *os.getgroups()}))]
            assert inside.stdout.split()[-4:] == ["0"] * 4
            shown = json.loads(testbed("show", "--json").stdout)
            assert shown["links"][0]["counters"]["up"]["packets"] > 0
            assert (tmp_path / "state").stat().st_uid == 0
        finally:
            down = testbed("down")
        assert down.returncode == 0, down.stderr
        assert testbed("clean").returncode == 0

    def test_captures_into_files_of_the_user(self, home: Path, secret: Path, tmp_path: Path) -> None:
        program = (
            "from pathlib import Path\n"
            "from testbed.net.fabric.fabric import Fabric\n"
            "from testbed.net.topology.files import load_topology\n"
            "with Fabric.build(load_topology(sys.argv[1]), 'userspace', captures=Path(sys.argv[2])): pass\n"
        )
        topology = tmp_path / "captured.yaml"
        topology.write_text(
            "nodes: [edge, cloud]\nlinks:\n  - {name: access, a: edge, b: cloud, profile: lte, pcap: true}\n"
        )
        captures = home / "captures"
        done = behind_sudo(program, str(topology), str(captures))
        assert done.returncode == 0, done.stderr
        assert all_users(home)
        first = sorted(captures.iterdir())[0]
        assert first.stat().st_size >= 24  # the header of a file
        first.unlink()
        first.symlink_to(secret)
        assert "is a link" in behind_sudo(program, str(topology), str(captures)).stderr
