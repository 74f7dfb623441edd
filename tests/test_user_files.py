"""Files that a user names: regular and of a bounded size, or one line that says what is wrong, at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.codecs.diagnosed import load_diagnosis
from testbed.codecs.entropy import tables
from testbed.errors import UsageError
from testbed.experiment.plan import load_plan
from testbed.files import read_at_most
from testbed.net.profile.profile import parse_profile
from testbed.net.topology.files import load_topology
from testbed.tasks.jsonl import read_rows

READERS: dict[str, Callable[[Path], object]] = {
    "scenario": lambda path: load_plan(str(path)),
    "topology": load_topology,
    "trace": lambda path: parse_profile(f"trace:{path}").steady(),
    "jitter": lambda path: parse_profile(f"delay=5ms,jitter=table(1ms,file={path})"),
    "questions": read_rows,
    "tables": tables.KEPT.load,
    "diagnosis": load_diagnosis,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    path = Path("/dev/zero")
    if kind == "fifo":
        path = tmp_path / "pipe.yaml"
        os.mkfifo(path)
    with pytest.raises(UsageError, match=r"not a regular file|not a topology file") as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("piece", [b"1", b"[", b"\0", b"\xff", b"1,", b"\xef\xbb\xbf\r\n"])
def test_a_line_without_an_end_or_of_no_text_is_one_line_that_names_the_file(
    tmp_path: Path, reader: str, piece: bytes
) -> None:
    path = tmp_path / "input"
    path.write_bytes(piece * 3_000_000)
    with pytest.raises(UsageError) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "five").write_bytes(b"12345")
    assert read_at_most(tmp_path / "five", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_at_most(tmp_path / "five", 4)
    with pytest.raises(IsADirectoryError):
        read_at_most(tmp_path, 4)
