"""The command line in this process: exit status and what it says, without the second that another process takes to begin. And
what a process of its own needs."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass

from testbed.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    status: int
    out: str
    errors: str


def command(*arguments: str) -> Ended:
    """`testbed` with these arguments."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            main(list(arguments))
    except SystemExit as ended:
        said = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
        return Ended(int(ended.code or 0), *said)
    raise AssertionError("the command line always ends by a status")


def hear_signals() -> None:
    """In a child: a shell that puts the tests in the background has SIGINT ignored, and nohup SIGHUP, which programs inherit."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
