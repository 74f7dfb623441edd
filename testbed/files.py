"""Files that are files: no pipe or device is waited for. Those of the testbed's own (`open_own`) appear whole or not at all, and
no link to them is followed; those that a user names (`open_named`) may be links.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, TextIO

from testbed.errors import StorageError


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """What the system refuses in the block becomes a StorageError that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644, owner: tuple[int, int] | None = None) -> Iterator[Path]:
    """A new file beside `path`, for the block to write, which takes its place in one step where the block ends well.

    `owner`: the user and group that it is given to; None: whose it is as it was made.
    Raises StorageError where that fails; then `path` is what it was, and nothing is left beside it.
    """
    with storing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}-", suffix=path.suffix)
        temporary = Path(name)
        try:
            with open(handle, "rb"):
                yield temporary
                os.fsync(handle)  # a file system may say only now that it has no room
                os.fchmod(handle, mode)
                if owner is not None:
                    os.fchown(handle, *owner)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def replace(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that a reader sees the old file or the new one. Raises StorageError."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(data)


def open_own(path: Path, flags: int, mode: int = 0o644) -> int:
    """A descriptor of a file of the testbed's own. Raises OSError; StorageError where `path` is a link, a pipe or a device."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError:
        if path.is_symlink():
            raise StorageError(f"{path} is a link, and links are not followed here") from None
        if path.exists() and not path.is_file():
            raise StorageError(f"{path} is no regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path} is no regular file")
    return handle


def read(path: Path) -> bytes:
    """What a file that is one has in it. Raises OSError, StorageError."""
    with open(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TextIO]:
    """A file that is one, as UTF-8 text; what is none reads as a replacement character. Raises OSError, StorageError."""
    with open(open_own(path, os.O_RDONLY), encoding="utf-8", errors="replace") as file:
        yield file


@contextlib.contextmanager
def writing(path: Path, more: int = os.O_TRUNC) -> Iterator[BinaryIO]:
    """A file that is one, made where it is missing: for a program to write into. Raises StorageError.

    `more`: os.O_TRUNC for one that is empty at first, os.O_APPEND for adding to it.
    """
    with storing(path):
        handle = open_own(path, os.O_WRONLY | os.O_CREAT | more)
    with open(handle, "wb") as file:
        yield file


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, made where it is missing, and see it on the disk: all of it, or the file is as before.

    Raises StorageError.
    """
    with storing(path):
        handle = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            before = os.fstat(handle).st_size
            try:
                left = memoryview(data)
                while left:  # a full disk takes a part of it before it refuses
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)


def open_named(path: str | Path) -> BufferedReader:
    """A file that a user names, open for reading bytes. Raises OSError, whose `strerror` says so where it is no regular file."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not hold us up
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISDIR(kind):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_at_most(path: str | Path, most_bytes: int) -> bytes:
    """All of a file that a user names. Raises OSError, whose `strerror` says so where it is larger than *most_bytes*."""
    with open_named(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", str(path))
    return data


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A directory among the temporary ones, gone behind the block; and so are those of this prefix and user that processes left
    which were killed: each is locked by whoever is at work in it.
    """
    for stale in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(stale, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if stale.lstat().st_uid == os.geteuid():
                shutil.rmtree(stale, ignore_errors=True)
    with contextlib.ExitStack() as held:
        path = _own(prefix, held)
        held.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def _own(prefix: str, held: contextlib.ExitStack) -> Path:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError):
            handle = held.enter_context(_locked(path, fcntl.LOCK_EX))
            if os.fstat(handle).st_nlink:  # else somebody took it for a stale one before it was locked
                return path


@contextlib.contextmanager
def _locked(directory: Path, how: int) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)
