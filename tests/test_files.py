"""Full disks, limits and directories that vanish: one line, and rows that are whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import files
from testbed.errors import StorageError
from testbed.experiment.results import RunDirectory
from testbed.experiment.row import Row
from tests.analysis.make_run import make_run

ROOT = Path(__file__).parents[1]


def a_row(number: int) -> Row:
    texts = dict.fromkeys(
        ("cell", "started_at", "model", "task", "example", "placement", "codec", "delivery", "profile", "link", "emulator",
         "transport", "congestion"), "x")  # fmt: skip
    return Row(trial=f"t{number}", repeat=0, context_tokens=1, answer="y" * 700, **texts)  # type: ignore[arg-type]


def limited(program: Callable[[], None], bytes_a_file: int) -> int:
    """The exit status of a child that may write no larger file."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
            program()
        except StorageError as error:
            os._exit(1 if "File too large" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_rows_are_whole_where_a_file_may_grow_no_further(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")

    def append() -> None:
        for number in range(100):
            run.append(a_row(number))

    assert limited(append, 20_000) == 1
    text = (run.path / "trials.jsonl").read_text()
    assert text.endswith("\n")
    assert 5 < len([json.loads(line) for line in text.splitlines()]) < 100
    run.append(a_row(100))
    assert [row["trial"] for row in run.rows()][-1] == "t100"


def test_what_is_replaced_stays_where_the_new_one_has_no_room(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    files.replace(path, b"old")
    assert limited(lambda: files.replace(path, b"x" * 100_000), 20_000) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_disk_refuses_only_when_it_has_to_be_there_is_not_taken_for_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for act in (lambda: files.replace(tmp_path / "f", b"new"), lambda: files.append(tmp_path / "f", b"new")):
        (tmp_path / "f").write_bytes(b"old")
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
            patch.setattr(os, "fsync", refuse)
            act()
        assert (tmp_path / "f").read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [tmp_path / "f"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_one_line_and_whole_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", examples=1)
    script = (  # in a mount namespace of its own
        f"mount -t tmpfs -o size=2m none {tmp_path}/disk && cp -r {run} {tmp_path}/disk/run && "
        f"cat /dev/zero > {tmp_path}/disk/filled 2> /dev/null; "
        f'cd {ROOT} && "$0" -m testbed plot {tmp_path}/disk/run; echo status $?; find {tmp_path}/disk -name ".*"'
    )
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "status 1" in done.stdout
    assert "No space left on device" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "/." not in done.stdout.replace("/../", "")  # nothing half-written


def test_a_run_directory_that_vanishes_is_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.append(a_row(0))
    (run.path / "trials.jsonl").unlink()
    run.path.rmdir()
    for act in (lambda: run.append(a_row(1)), lambda: run.write("manifest.json", {})):
        with pytest.raises(StorageError, match=f"{run.path}.*No such file"):
            act()


@pytest.mark.parametrize(
    "command", [["codecs"], ["tasks", "--json"], ["profiles"], ["models"], ["plan", "quick"], ["doctor"], ["--help"]]
)  # fmt: skip
@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_takes_leaves_no_traceback(command: list[str], full: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") if full else os.fdopen(writing, "w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "testbed", *command], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
    assert done.returncode == 1
    # Where the reader has gone, as `head` does, it has seen enough.
    assert len(done.stderr.splitlines()) == int(full), done.stderr
    assert not full or "No space left on device" in done.stderr


def test_links_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "link", "is a link"), (tmp_path / "pipe", "no regular file")):
        for act in (lambda p=path: files.read(p), lambda p=path: files.append(p, b"x")):
            with pytest.raises((StorageError), match=words):
                act()
    with pytest.raises(StorageError, match="no regular file"):
        files.append(Path("/dev/null"), b"x")


def test_what_a_killed_process_left_is_gone_with_the_next_one_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = "from testbed import files\nwith files.scratch('of-shards-') as path:\n  print(path, flush=True)\n  input()"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed, at_work = (
        subprocess.Popen(
            [sys.executable, "-c", said],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    )
    left, used = (Path(process.stdout.readline().strip()) for process in (killed, at_work) if process.stdout)
    (left / "rows").write_text("x")
    killed.kill()
    killed.communicate()
    (tmp_path / "of-shards-link").symlink_to(used)
    with files.scratch("of-shards-") as own:
        assert (left.exists(), used.is_dir(), own.is_dir()) == (False, True, True)
        with pytest.raises(FileNotFoundError), files.scratch("of-others-"):
            raise FileNotFoundError("the block's own")
    at_work.communicate("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["of-shards-link"]
