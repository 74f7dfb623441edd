"""What a host reached over SSH does for the programs that it runs: real sshds, each in a namespace with a user of its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Load
from testbed.errors import EndpointError, StorageError, UsageError
from testbed.experiment import sending
from testbed.hosts.host import host, lines
from testbed.hosts.ssh import Ssh
from tests.hosts import bench as benches
from tests.hosts.bench import Host, wait_for

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(benches.missing()), reason=benches.missing() or "-"),
]


def test_a_programs_streams_environment_status_and_last_words_are_its_starters(there: Ssh) -> None:
    program = (
        "import os, sys; print(sys.stdin.readline().strip(), os.environ.get('SHELL'), os.environ['PUT_IN'], "
        "os.uname().nodename, flush=True); sys.exit('the end')"
    )
    with there.start(["python3", "-c", program], {"SHELL": None, "PUT_IN": "2"}) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read() == b"hello None 2 tb-edge\n"
        assert (process.status(None), process.last_words()) == (1, "the end")


def test_what_a_program_prints_besides_is_in_its_log_while_it_runs(there: Ssh, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with there.start(["sh", "-c", "printf one >&2; read x; echo two >&2"], {}, log) as process:
        assert wait_for(lambda: log.read_bytes() == b"one")
        assert process.status() is None and process.pid in pids(there)
    assert process.status() == 0 and log.read_bytes() == b"onetwo\n" and process.last_words() == "onetwo"


def pids(there: Ssh) -> list[int]:
    return [int(word) for word in there.run(["ps", "-eo", "pid="])[1].split()]


def test_a_program_is_killed_at_once_with_its_children_where_its_starter_fails(
    there: Ssh, edge: Host
) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError), there.start(["sh", "-c", "sleep 100 & sleep 101"], {}) as process:
        assert wait_for(lambda: sum(words[0] == "sleep" for words in edge.programs().values()) == 2)
        raise RuntimeError
    assert process.status() == -9 and time.monotonic() - started < 3
    assert wait_for(lambda: not edge.programs())


def test_a_program_that_does_not_leave_when_its_input_ends_is_killed(there: Ssh) -> None:
    with there.start(["sleep", "100"], {}) as process:
        pass
    assert process.status() == -9


def test_a_program_that_does_not_exist_is_an_error_that_names_it(there: Ssh) -> None:
    with pytest.raises(EndpointError, match="cannot start no-such-program: No such file"):
        there.start(["no-such-program"], {})


def test_megabytes_cross_both_ways_and_a_reader_that_leaves_holds_up_nobody(there: Ssh) -> None:
    data = os.urandom(3 << 20)
    assert there.run(["cat"], data) == (0, data)
    with there.start(["sh", "-c", "head -c 9000000 /dev/zero; echo done >&2"], {}) as process:
        process.stdout.close()
        assert process.status(20) == 0 and process.last_words() == "done"


def test_what_runs_without_end_or_prints_without_end_is_ended(there: Ssh) -> None:
    with pytest.raises(EndpointError, match="sleep has not ended"):
        there.run(["sleep", "100"], within_s=0.3)
    with pytest.raises(EndpointError, match="yes prints more than 100000 bytes"):
        there.run(["yes"], most=100_000)


def test_a_program_that_stands_still_is_ended_and_that_is_said(there: Ssh) -> None:
    said = []
    with there.start(["sh", "-c", "echo one; kill -STOP $$; echo two"], {}) as process:
        with pytest.raises(EndpointError, match=r"it \(process \d+\) has been stopped for 1"):
            for line in lines(process, "it"):
                said.append(line)
        assert process.status(None) == -9 and process.stopped_s() > 1
        assert "has been stopped for 1" in process.last_words()
    assert said == [b"one"]


def test_files_reach_a_host_and_come_back(there: Ssh, edge: Host, tmp_path: Path) -> None:
    here, again = tmp_path / "here", tmp_path / "again"
    here.write_bytes(os.urandom(3_000_000))
    here.chmod(0o755)
    there.put(here, Path("~/there"))
    there.get(Path("~/there"), again)
    assert again.read_bytes() == here.read_bytes()
    assert [path.stat().st_mode & 0o777 for path in (again, edge.home / "there")] == [0o755, 0o755]
    (edge.home / "there").unlink()


def test_a_file_that_cannot_be_written_or_read_is_an_error_with_its_name(there: Ssh, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_bytes(b"data")
    for call, said in (
        (lambda: there.put(here, Path("/etc/no")), "cannot be written: Permission denied: /etc/no"),
        (
            lambda: there.put(here, Path("~/no/such")),
            "cannot be written: No such file or directory: .*/no/such",
        ),
        (lambda: there.get(Path("~/none"), here), "cannot be read: No such file or directory: .*/none"),
        (lambda: there.put(tmp_path / "none", Path("~/none")), "none: No such file"),
    ):
        with pytest.raises(StorageError, match=said):
            call()
    assert here.read_bytes() == b"data"


def test_what_was_sent_there_is_its_users_alone_and_goes_where_no_run_is_on(
    there: Ssh, edge: Host, tmp_path: Path
) -> None:
    here, sent = tmp_path / "own.jsonl", edge.home / ".cache/testbed/sent"
    here.write_text("{}\n")
    (edge.home / ".bashrc").write_text("umask 0\n")
    target = sending.there(there, str(here))
    (edge.home / ".bashrc").unlink()
    assert (edge.home / target).read_text() == "{}\n"
    assert {path.stat().st_mode & 0o777 for path in (sent, (edge.home / target).parent)} == {0o700}
    with there.start(["sleep", "100"], {}):
        assert there.clean(sent=True) == [] and sent.exists()
    assert wait_for(lambda: not edge.programs())
    assert there.clean() == [] and sent.exists()
    assert there.clean(sent=True) == [
        f"{edge.url}: removed /home/{edge.user}/.cache/testbed/sent, which was sent there for runs"
    ]
    assert not sent.exists()
    there.run(["rm", "-r", ".cache"])


def test_a_host_says_what_it_is_and_how_far_its_clock_is_ahead(there: Ssh, edge: Host) -> None:
    about = there.describe()
    assert (about["kind"], about["user"], about["hostname"]) == ("ssh", "tb-edge", "tb-edge")
    ahead, error = there.clock()  # one kernel has one monotonic clock
    assert abs(ahead) <= error < 1
    ours, theirs = there.addresses()
    assert theirs == edge.address and ours.rpartition(".")[0] == theirs.rpartition(".")[0]


def test_an_endpoint_runs_there_and_is_called_as_anywhere(edge: Host, tmp_path: Path) -> None:
    with host("ssh", address=edge.url, python=sys.executable) as there:
        endpoint = Endpoint.start("cloud", there, tmp_path / "log")
        with endpoint.process, pytest.raises(UsageError, match="nowhere"):
            endpoint.call(Load("nowhere", "cpu"), 120)
        assert endpoint.process.status() == 0
