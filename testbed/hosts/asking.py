"""Short programs on a host: they are started, tell what there is to tell, and end."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from testbed import descriptors
from testbed.deadline import Deadline
from testbed.errors import EndpointError
from testbed.hosts import survey
from testbed.hosts.host import Host, Process

_MOST = 16 << 20  #: bytes of an answer
_ASKED_S, _TORCH_S, _LOOK_S = 60.0, 180.0, 0.25


def run(
    host: Host, argv: Sequence[str], within_s: float, log: Path | None = None, what: str = ""
) -> tuple[int, bytes, str]:
    """A program's exit status, what it printed, and the last line of its complaints. Raises EndpointError, naming `what` it
    is, where it does not end in time, or prints more than an answer is."""
    what = what or argv[0]
    deadline = Deadline(within_s)
    with host.start(argv, {}, log) as process:
        printed = read(process, lambda data: len(data) > _MOST, deadline, what)
        if len(printed) > _MOST:
            raise EndpointError(f"{what} prints without end")
        status = process.status(_left(deadline, what))
        if status is None:
            raise EndpointError(f"{what} has not ended within {within_s:.0f} s")
        return status, printed, process.last_words()


def read(process: Process, enough: Callable[[bytes], bool], deadline: Deadline, what: str) -> bytes:
    """What a process prints until that is enough, or it ends. Raises EndpointError where neither is so in time."""
    data = b""
    while not enough(data):
        if descriptors.ready([process.stdout], min(_LOOK_S, _left(deadline, what))):
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            data += piece
    return data


def _left(deadline: Deadline, what: str) -> float:
    try:
        return deadline.left() or 0.0
    except TimeoutError as error:
        raise EndpointError(f"{what} has not ended within {deadline}") from error


def program(python: str, *arguments: str) -> list[str]:
    """The argument vector of `survey` as a program of that Python, which need not have the testbed."""
    return [python, "-I", "-c", inspect.getsource(survey), *arguments]


def asked(host: Host, python: str, *arguments: str) -> Any:
    """What `survey` answers there. Raises EndpointError."""
    within_s = _TORCH_S if "torch" in arguments else _ASKED_S
    status, printed, words = run(
        host, program(python, *arguments), within_s, what=f"what looks at it ({python})"
    )
    if status:
        raise EndpointError(f"{python} there ended by status {status}: {words}")
    try:
        return json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise EndpointError(f"{python} there answered {printed[-80:]!r}, which is none") from error
