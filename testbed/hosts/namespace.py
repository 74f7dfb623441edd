"""Opening sockets and devices inside a network namespace, without moving this process there.

A thread of its own enters the namespace and ends; what it opened stays in that namespace. See setns(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from testbed.errors import NetworkError, UsageError

_CLONE_NEWNET = 0x40000000
_DIRECTORY = Path("/run/netns")
_ROOT_NEEDED = "network namespaces need root; run it with sudo"

T = TypeVar("T")


def inside(namespace: str, call: Callable[[], T]) -> T:
    """What *call* returns (or raises) when run within the named namespace (one under /run/netns).

    Raises NetworkError when there is no such namespace, UsageError without the right to enter it.
    """

    def enter() -> None:
        try:
            with open(_DIRECTORY / namespace, "rb") as handle:
                _libc_call("setns", handle.fileno(), _CLONE_NEWNET)
        except FileNotFoundError:
            raise NetworkError(f"network namespace {namespace!r} does not exist (any more)") from None

    return _in_thread(enter, call)


def inside_scratch(call: Callable[[], T]) -> T:
    """What *call* returns within a new, nameless namespace, which ends with the last thing open in it."""
    return _in_thread(lambda: _libc_call("unshare", _CLONE_NEWNET), call)


def _in_thread(enter: Callable[[], None], call: Callable[[], T]) -> T:
    outcome: list[Any] = []

    def work() -> None:
        try:
            enter()
            outcome.extend((True, call()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=work, name="namespace")
    thread.start()
    thread.join()
    succeeded, value = outcome
    if not succeeded:
        raise value
    return value


def _libc_call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise UsageError(_ROOT_NEEDED)
        raise NetworkError(f"{function}: {os.strerror(number)}")
