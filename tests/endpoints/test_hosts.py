"""What a host does for the programs that it runs, and that one more kind of host takes one file and one line."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Load
from testbed.errors import EndpointError, UsageError
from testbed.hosts import host as hosts
from testbed.hosts.host import host, lines


def test_an_endpoint_runs_on_a_kind_of_host_that_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hosts.KINDS, "marked", "tests.endpoints.marked_host:Marked")
    endpoint = Endpoint.start("cloud", host("marked", mark="here"), tmp_path / "log")
    with endpoint.process as process, pytest.raises(UsageError, match="nowhere"):
        assert "MARK=here" in Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        endpoint.call(Load("nowhere", "cpu"), 120)


def test_a_programs_streams_environment_status_and_last_words_are_its_starters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAKEN_OUT", "1")
    program = (
        "import os, sys; print(sys.stdin.readline().strip(), os.environ.get('TAKEN_OUT'), os.environ['PUT_IN']); "
        "sys.exit('the end')"
    )
    with host("local").start([sys.executable, "-c", program], {"TAKEN_OUT": None, "PUT_IN": "2"}) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read() == b"hello None 2\n"
        assert (process.status(None), process.last_words()) == (1, "the end")


def test_a_program_is_killed_at_once_where_its_starter_fails() -> None:
    with pytest.raises(RuntimeError), host("local").start(["sleep", "100"], {}) as process:
        raise RuntimeError
    assert process.status() == -9


def test_a_program_that_does_not_exist_is_an_error_that_names_it() -> None:
    with host("local").start(["no-such-program"], {}) as process:
        assert process.status(None) not in (0, None)
        assert "no-such-program" in process.last_words()


def test_what_a_program_prints_comes_line_by_line_until_it_ends_or_stands_still() -> None:
    with host("local").start(["sh", "-c", "echo one; sleep 0.4; echo two; printf three"], {}) as process:
        assert list(lines(process, "it")) == [b"one", b"two", b"three"]
    started, said = time.monotonic(), []
    stops = ["sh", "-c", "echo one; kill -STOP $$; echo two"]
    refused = pytest.raises(EndpointError, match=r"the diagnosis \(process \d+\) has been stopped for 1")
    with refused, host("local").start(stops, {}) as process:
        said += lines(process, "the diagnosis")
    assert time.monotonic() - started < 8 and process.status() == -9


def test_files_reach_a_host_and_come_back(tmp_path: Path) -> None:
    here, there, again = tmp_path / "here", tmp_path / "there", tmp_path / "again"
    here.write_bytes(b"data")
    place = host("local")
    place.put(here, there)
    place.get(there, again)
    assert again.read_bytes() == b"data"
    assert place.clock() == (0.0, 0.0)
    assert place.describe()["kind"] == "local"
