"""Waiting for open files, whatever their numbers: select(2) takes none from 1,024 on, and a process may have many more.

Standard library alone: isolated programs (`testbed.programs`) load it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterable
from time import monotonic
from typing import Protocol, TypeVar


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


File = TypeVar("File", bound="int | _HasFileno")

_POLLFD = struct.Struct("=ihh")
_TIMESPEC = struct.Struct("@ll")
_ppoll = ctypes.CDLL(None, use_errno=True).ppoll
_ppoll.argtypes = (ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_void_p)


def ready(reading: Iterable[File], seconds: float | None = None, writing: Iterable[File] = ()) -> list[File]:
    """Those that can be read, and those of `writing` that can be written, without waiting; an end or an error counts as both.

    Waits for one for at most so many seconds, None: without end; to the microsecond, where `select.poll` and `select.epoll` know
    milliseconds. By ppoll(2). Raises OSError: EBADF for what is not open.
    """
    files, read = [*reading], select.POLLIN
    waited = [(read, file) for file in files] + [(select.POLLOUT, file) for file in writing]
    asked = ctypes.create_string_buffer(
        b"".join(_POLLFD.pack(_number(file), event, 0) for event, file in waited)
    )
    until = None if seconds is None else monotonic() + seconds
    while True:
        left = None if until is None else max(0.0, until - monotonic())
        given = None if left is None else _TIMESPEC.pack(int(left), int(left % 1 * 1e9))
        if _ppoll(asked, len(waited), given, None) >= 0:
            break
        if (
            number := ctypes.get_errno()
        ) != errno.EINTR:  # a signal's handler has run by now, and may have raised
            raise OSError(number, os.strerror(number))
    found = [
        (file, events)
        for (_, file), (_, _, events) in zip(waited, _POLLFD.iter_unpack(asked.raw[:-1]), strict=True)
    ]
    if any(events & select.POLLNVAL for _, events in found):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return [file for file, events in found if events]


def _number(file: int | _HasFileno) -> int:
    return file if isinstance(file, int) else file.fileno()
